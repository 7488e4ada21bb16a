#include "linear.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"

namespace hotneuron {
namespace {

// Chunks are small enough to share out evenly, large enough that taking one costs nothing beside it.
constexpr int64_t kChunksPerThread = 6, kLeastChunkBytes = 8 * 1024, kMostChunkBytes = 48 * 1024;
constexpr int64_t kRowTile = 4;
constexpr int64_t kNormTokensPerTask = 8;

constexpr int64_t kRoundTokensPerTask = 4;

struct NormedTag;
struct RoundedTag;
struct MoreTag;
template <class Tag>
struct TileTag;

template <class Tag>
const TokenTile* tiles_of(const Vectors& x, int64_t num_tokens) {
  constexpr int64_t kColumns = 4;  // whose bytes stand together
  const int64_t width = x.ld, C = width / kGroup;
  const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
  int8_t* q = scratch<TileTag<Tag>, int8_t>(num_tiles * width * kTileTokens);
  float* scale = scratch<TileTag<Tag>>(2 * num_tiles * C * kTileTokens);
  TokenTile* tiles = scratch<TileTag<Tag>, TokenTile>(num_tiles);
  parallel_for(num_tiles, [&](int64_t t) {
    int8_t* q_tile = q + t * width * kTileTokens;
    float* scale_tile = scale + 2 * t * C * kTileTokens;
    float* sum_tile = scale_tile + C * kTileTokens;
    for (int64_t k = 0; k < kTileTokens; ++k) {
      const int64_t n = t * kTileTokens + k;
      if (n >= num_tokens) {
        for (int64_t c = 0; c < width; c += kColumns) {
          std::fill_n(q_tile + c * kTileTokens + k * kColumns, kColumns, int8_t{0});
        }
        for (int64_t g = 0; g < C; ++g) {
          scale_tile[g * kTileTokens + k] = sum_tile[g * kTileTokens + k] = 0.0f;
        }
        continue;
      }
      const int8_t* source = x.q + n * width;
      for (int64_t c = 0; c < width; c += kColumns) {
        std::memcpy(q_tile + c * kTileTokens + k * kColumns, source + c, kColumns);
      }
      for (int64_t g = 0; g < C; ++g) {
        scale_tile[g * kTileTokens + k] = x.scale[n * C + g];
        sum_tile[g * kTileTokens + k] = x.sum[n * C + g];
      }
    }
    tiles[t] = {q_tile, scale_tile, sum_tile};
  });
  return tiles;
}

template <class Tag>
Vectors vectors_in(DType dtype, const float* x_ND, int64_t num_tokens, int64_t width) {
  if (!is_grouped(dtype)) return {x_ND, width};
  const int64_t C = width / kGroup;
  int8_t* q_ND = scratch<Tag, int8_t>(2 * num_tokens * width);
  int8_t* halves_ND = q_ND + num_tokens * width;
  int32_t* total_NC = scratch<Tag, int32_t>(num_tokens * C);
  float* scale_NC = scratch<Tag>(2 * num_tokens * C);
  float* sum_NC = scale_NC + num_tokens * C;
  const Kernels& k = kernels();
  parallel_for((num_tokens + kRoundTokensPerTask - 1) / kRoundTokensPerTask, [&](int64_t task) {
    const int64_t begin = task * kRoundTokensPerTask;
    const int64_t end = std::min(begin + kRoundTokensPerTask, num_tokens);
    for (int64_t n = begin; n < end; ++n) {
      k.round_groups(x_ND + n * width, C,
                     {q_ND + n * width, halves_ND + n * width, scale_NC + n * C, total_NC + n * C,
                      sum_NC + n * C});
    }
  });
  Vectors x = {x_ND, width, q_ND, halves_ND, scale_NC, total_NC, sum_NC};
  if (k.tile_from > 0 && num_tokens >= k.tile_from) x.tiles = tiles_of<Tag>(x, num_tokens);
  return x;
}

}  // namespace

Vectors vectors_for(DType dtype, const float* x_ND, int64_t num_tokens, int64_t width) {
  return vectors_in<RoundedTag>(dtype, x_ND, num_tokens, width);
}

Vectors more_vectors_for(DType dtype, const float* x_ND, int64_t num_tokens, int64_t width) {
  return vectors_in<MoreTag>(dtype, x_ND, num_tokens, width);
}

void linear(const float* x_ND, int64_t num_tokens, const Matrix& w_OD, float* y_NO,
            bool accumulate) {
  if (num_tokens == 0) return;
  const int64_t num_rows = w_OD.num_rows, width = w_OD.num_columns;
  const int64_t row_bytes = std::max<int64_t>(1, bytes_of(w_OD.dtype, width));
  const int64_t chunk_bytes = std::clamp(num_rows * row_bytes / (kChunksPerThread * num_threads()),
                                         kLeastChunkBytes, kMostChunkBytes);
  const Vectors x = vectors_for(w_OD.dtype, x_ND, num_tokens, width);
  const int64_t row_tile = x.tiles ? kTileRows : kRowTile;
  const int64_t chunk = std::max<int64_t>(1, chunk_bytes / row_bytes / row_tile) * row_tile;
  const Kernels& k = kernels();
  parallel_for((num_rows + chunk - 1) / chunk, [&](int64_t c) {
    const int64_t begin = c * chunk;
    const Rows rows = w_OD.rows().part(begin, std::min(chunk, num_rows - begin));
    k.dot_rows(rows, x, num_tokens, y_NO + begin, num_rows, accumulate);
  });
}

void rms_norm(const float* x_ND, int64_t num_tokens, int64_t width, const Norm& norm, float* y_ND) {
  const Kernels& k = kernels();
  parallel_for((num_tokens + kNormTokensPerTask - 1) / kNormTokensPerTask, [&](int64_t task) {
    const int64_t begin = task * kNormTokensPerTask;
    const int64_t end = std::min(num_tokens, begin + kNormTokensPerTask);
    for (int64_t n = begin; n < end; ++n) {
      k.rms_norm(x_ND + n * width, norm.weight, norm.dtype, norm.eps, width, y_ND + n * width);
    }
  });
}

void norm_linear(const float* x_ND, int64_t num_tokens, const Norm& norm, const Matrix& w_OD,
                 float* y_NO) {
  float* normed_ND = scratch<NormedTag>(num_tokens * w_OD.num_columns);
  rms_norm(x_ND, num_tokens, w_OD.num_columns, norm, normed_ND);
  linear(normed_ND, num_tokens, w_OD, y_NO, false);
}

}  // namespace hotneuron

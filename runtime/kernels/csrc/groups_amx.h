// Dot products of grouped rows with many vectors by AMX: sixteen rows and sixteen tokens at a time.
//
// A tile holds one group of sixteen rows, another the same group of sixteen tokens; their product is
// every whole sum of that group at once. Each row then scales its sums with the tokens in the lanes
// of a register, in the order in which GroupDot adds groups, so both give the same bits.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "groups_avx512.h"

namespace {

using hotneuron::kTileTokens;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};
};

// Tiles 0 to 3: sums; 4 and 5: weights; 6 and 7: vectors.
inline TileConfig tile_config() {
  TileConfig config;
  for (int i = 0; i < 4; ++i) config.row_bytes[i] = 64, config.num_rows[i] = 16;
  for (int i = 4; i < 6; ++i) config.row_bytes[i] = kGroup, config.num_rows[i] = 16;
  for (int i = 6; i < 8; ++i) config.row_bytes[i] = 64, config.num_rows[i] = kGroup / 4;
  return config;
}

// The whole numbers of a row's groups, one byte each. Writes whole registers: one group too much if
// their number is odd.
template <DType kType>
INLINE void unpack_groups(const uint8_t* q, int64_t count, int8_t* out) {
  if (kType == DType::q8) {
    memcpy(out, q, count * kGroup);
    return;
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < count; g += 2, q += kGroup, out += 2 * kGroup) {
    const __m256i both = _mm256_maskz_loadu_epi8(count - g == 1 ? 0xFFFF : 0xFFFFFFFF, q);
    const __m512i wide = _mm512_castsi256_si512(both);
    const __m512i twice = _mm512_shuffle_i64x2(wide, wide, 0x50);  // of the second the high halves
    const __m512i spread = _mm512_mask_srli_epi16(twice, 0xFF00FF00, twice, 4);
    _mm512_storeu_si512(out, _mm512_and_si512(spread, nibble));
  }
}

// What becomes of a lane's sum once its last group is in.
enum class Fold : int8_t { none, first, second, third, fourth, fourth_of_rest };

// A group, in the order in which GroupDot's lanes can be added up without keeping all of them: lane
// by lane, a lane's groups ascending.
struct TileStep {
  int32_t group;  // -1: the lane has none
  bool starts_lane;
  Fold fold;
};

// Writes the steps for rows of so many groups, at most num_groups + 3; returns their number.
inline int64_t plan_steps(int64_t num_groups, TileStep* steps) {
  constexpr int64_t kLanes = 16;
  const int64_t in_sixteens = num_groups / kLanes * kLanes;
  int64_t n = 0;
  const auto add_lane = [&](int64_t begin, int64_t end, int64_t apart, Fold fold) {
    const int64_t first = n;
    for (int64_t g = begin; g < end; g += apart) {
      steps[n++] = {static_cast<int32_t>(g), g == begin, Fold::none};
    }
    if (n == first) steps[n++] = {-1, true, Fold::none};
    steps[n - 1].fold = fold;
  };
  for (int64_t j = 0; j < 4 && in_sixteens > 0; ++j) {
    add_lane(j, in_sixteens, kLanes, Fold::first);
    add_lane(j + 8, in_sixteens, kLanes, Fold::second);
    add_lane(j + 4, in_sixteens, kLanes, Fold::third);
    add_lane(j + 12, in_sixteens, kLanes, Fold::fourth);
  }
  if (in_sixteens == num_groups) return n;
  for (int64_t j = 0; j < kQuad; ++j) {
    const Fold fold[kQuad] = {Fold::first, Fold::second, Fold::third, Fold::fourth_of_rest};
    add_lane(in_sixteens + j, num_groups, kQuad, fold[j]);
  }
  return n;
}

// Sixteen rows times tiles of tokens.
template <DType kType>
class TileDot {
 public:
  static constexpr int kRows = hotneuron::kTileRows;
  using Row = typename GroupDot<kType, 1, false>::Row;

  // Bytes of memory for rows of so many groups.
  static constexpr int64_t memory_for(int64_t groups) {
    return kRows * (weights_apart(groups) + 2 * scales_apart(groups) * 4) +
           (groups + 3) * static_cast<int64_t>(sizeof(TileStep));
  }
  // `memory` starts at a cache line.
  TileDot(int64_t groups, void* memory)
      : num_groups_(groups),
        apart_(weights_apart(groups)),
        bytes_(static_cast<int8_t*>(memory)),
        scale_(reinterpret_cast<float*>(bytes_ + kRows * apart_)),
        least_(scale_ + kRows * scales_apart(groups)),
        steps_(reinterpret_cast<TileStep*>(least_ + kRows * scales_apart(groups))),
        num_steps_(plan_steps(groups, steps_)) {}

  void load(const Row* rows) {
    const int64_t C = num_groups_;
    for (int r = 0; r < kRows; ++r) {
      unpack_groups<kType>(rows[r].q, C, bytes_ + r * apart_);
      widen(rows[r].scale, scale_ + r * scales_apart(C));
      if (kType == DType::u4) widen(rows[r].scale + C, least_ + r * scales_apart(C));
    }
  }

  // out[r]: the products of row r, a register of tokens. Meanwhile what lies ahead of `rows` is
  // asked for, if there are any.
  void multiply(const hotneuron::TokenTile& x, const Row* rows, Vec::Reg* out) const {
    for (int r = 0; r < kRows; ++r) out[r] = Vec::set1(0.0f);
    alignas(64) int32_t whole[2][kAtOnce][kRows][kTileTokens];
    Folds folds;
    Vec::Reg sum[kRows];
    // The scaling of some steps goes on while the tiles of the next ones multiply.
    for (int64_t i = 0; i < num_steps_ + kAtOnce; i += kAtOnce) {
      if (i < num_steps_) multiply_tiles(x, i, whole[i / kAtOnce % 2]);
      if (i == 0) continue;
      const int64_t first = i - kAtOnce;
      for (int64_t n = first; n < i && n < num_steps_; ++n) {
        const TileStep step = steps_[n];
        if (step.starts_lane) {
          UNROLL16
          for (int r = 0; r < kRows; ++r) sum[r] = Vec::set1(0.0f);
        }
        if (rows && step.group >= 0) ask_ahead(rows, step.group);
        if (step.group >= 0) {
          add_scaled(x, step.group, whole[first / kAtOnce % 2][n - first], sum);
        }
        if (step.fold != Fold::none) folds.add(step.fold, sum, out);
      }
    }
  }

 private:
  static constexpr int kAtOnce = 4;
  // Neither is a power of two, which would make rows share cache sets.
  static constexpr int64_t weights_apart(int64_t groups) { return (groups + 3) / 2 * 2 * kGroup; }
  static constexpr int64_t scales_apart(int64_t groups) { return (groups + 31) / 16 * 16; }

  // (((v0 + v8) + (v4 + v12)) + ...) over lanes, as Vec::sum4 adds them up, and the rest's four.
  struct Folds {
    Vec::Reg left[kRows], right[kRows], third_quarter[kRows];
    int num_quarters = 0;

    INLINE void add(Fold fold, const Vec::Reg* sum, Vec::Reg* out) {
      if (fold == Fold::first) {
        for (int r = 0; r < kRows; ++r) left[r] = sum[r];
      } else if (fold == Fold::second) {
        for (int r = 0; r < kRows; ++r) left[r] = Vec::add(left[r], sum[r]);
      } else if (fold == Fold::third) {
        for (int r = 0; r < kRows; ++r) right[r] = sum[r];
      } else {
        for (int r = 0; r < kRows; ++r) {
          left[r] = Vec::add(left[r], Vec::add(right[r], sum[r]));
        }
        if (fold == Fold::fourth_of_rest) {
          for (int r = 0; r < kRows; ++r) out[r] = Vec::add(out[r], left[r]);
        } else {
          add_quarter(out);
        }
      }
    }
    void add_quarter(Vec::Reg* out) {
      switch (num_quarters++) {
        case 0:
          for (int r = 0; r < kRows; ++r) out[r] = left[r];
          break;
        case 1:
          for (int r = 0; r < kRows; ++r) out[r] = Vec::add(out[r], left[r]);
          break;
        case 2:
          for (int r = 0; r < kRows; ++r) third_quarter[r] = left[r];
          break;
        default:
          for (int r = 0; r < kRows; ++r) {
            out[r] = Vec::add(out[r], Vec::add(third_quarter[r], left[r]));
          }
      }
    }
  };

  void widen(const Half* p, float* out) const {
    for (int64_t g = 0; g < num_groups_; g += 16) {
      const int64_t rest = num_groups_ - g;
      Vec::store(out + g, rest < 16 ? Vec::load(p + g, rest) : Vec::load(p + g));
    }
  }

  // Of the line that group g is in, the share of rows that falls to it.
  INLINE void ask_ahead(const Row* rows, int64_t g) const {
    constexpr int64_t kPerLine = kLineBytes / (kType == DType::q8 ? kGroup : kGroup / 2);
    constexpr int64_t kShare = kRows / kPerLine;
    const Row* first = rows + g % kPerLine * kShare;
    for (int r = 0; r < kShare; ++r) ask_for(first[r].ahead + g / kPerLine * kLineBytes);
  }

  // The intrinsics take literals only.
#define HOTNEURON_MULTIPLY_TILE(sum, weight, vector)                              \
  if (first + sum < num_steps_ && steps_[first + sum].group >= 0) {               \
    const int64_t column = int64_t{kGroup} * steps_[first + sum].group;           \
    _tile_zero(sum);                                                              \
    _tile_loadd(weight, bytes_ + column, apart_);                                 \
    _tile_loadd(vector, x.q + column * kTileTokens, 64);                          \
    _tile_dpbssd(sum, weight, vector);                                            \
  }
  INLINE void multiply_tiles(const hotneuron::TokenTile& x, int64_t first,
                             int32_t (*whole)[kRows][kTileTokens]) const {
    HOTNEURON_MULTIPLY_TILE(0, 4, 6)
    HOTNEURON_MULTIPLY_TILE(1, 5, 7)
    HOTNEURON_MULTIPLY_TILE(2, 4, 6)
    HOTNEURON_MULTIPLY_TILE(3, 5, 7)
    _tile_stored(0, whole[0], 64);
    _tile_stored(1, whole[1], 64);
    _tile_stored(2, whole[2], 64);
    _tile_stored(3, whole[3], 64);
  }
#undef HOTNEURON_MULTIPLY_TILE

  INLINE void add_scaled(const hotneuron::TokenTile& x, int64_t g,
                         const int32_t (*whole)[kTileTokens], Vec::Reg* sum) const {
    const int64_t apart = scales_apart(num_groups_);
    const Vec::Reg x_scale = Vec::load(x.scale + g * kTileTokens);
    Vec::Reg x_sum;
    if (kType == DType::u4) x_sum = Vec::load(x.sum + g * kTileTokens);
    UNROLL16
    for (int r = 0; r < kRows; ++r) {
      const Vec::Reg times = Vec::mul(Vec::set1(scale_[r * apart + g]), x_scale);
      sum[r] = Vec::fma(_mm512_cvtepi32_ps(_mm512_load_si512(whole[r])), times, sum[r]);
      if (kType == DType::u4) {
        sum[r] = Vec::fma(Vec::set1(least_[r * apart + g]), x_sum, sum[r]);
      }
    }
  }

  const int64_t num_groups_, apart_;
  int8_t* const bytes_;
  float *const scale_, *const least_;  // [kRows, scales_apart]
  TileStep* const steps_;
  const int64_t num_steps_;
};

}  // namespace

#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "bf16.h"
#include "thread_pool.h"

namespace hotneuron {
namespace {

constexpr int64_t kRowsPerTask = 16;
constexpr float kLargestHalf = 65504.0f;
constexpr float kHighest4 = 15.0f;
// Shares of a group's range that 4 bits are first spread over; values beyond are cut.
constexpr float kSpreads[] = {1.0f, 0.92f, 0.84f};
constexpr int kRefits = 2;

// What a group's whole numbers mean: scale * q + least.
struct Grid {
  uint16_t scale, least;
};

float half_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half & 0x7FFF) << 13;
  float size;
  std::memcpy(&size, &bits, sizeof(size));
  size *= 0x1p112f;  // exponents differ by 112
  return half & 0x8000 ? -size : size;
}

// To nearest, halves to even; `x` is no larger than kLargestHalf.
uint16_t float_to_half(float x) {
  const float size = std::fabs(x);
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (size < 0x1p-14f) {  // subnormal: multiples of 2^-24
    return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(size * 0x1p24f)));
  }
  uint32_t bits;
  std::memcpy(&bits, &size, sizeof(bits));
  bits += 0xFFF + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | (bits - (112u << 23)) >> 13);
}

void load_group(const Rows& rows, int64_t row, int64_t group, float* out) {
  const char* data = static_cast<const char*>(rows.row(row)) +
                     bytes_of(rows.dtype, group * kGroup);
  if (rows.dtype == DType::f32) {
    std::memcpy(out, data, kGroup * sizeof(float));
  } else {
    uint16_t bits[kGroup];
    std::memcpy(bits, data, sizeof(bits));
    for (int64_t c = 0; c < kGroup; ++c) out[c] = from_bf16(bits[c]);
  }
}

float rounded(float x, float lowest, float highest) {
  // adding 1.5 * 2^23 rounds to a whole number, halves to even
  return std::min(std::max((x + 12582912.0f) - 12582912.0f, lowest), highest);
}

float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

struct Range {
  float least, greatest;
  bool is_finite;  // and small enough for fp16
};

Range range_of(const float* x) {
  Range range = {x[0], x[0], true};
  for (int64_t c = 0; c < kGroup; ++c) {
    range.is_finite = range.is_finite && std::fabs(x[c]) <= kLargestHalf;
    range.least = std::min(range.least, x[c]);
    range.greatest = std::max(range.greatest, x[c]);
  }
  return range;
}

// Whole numbers of a group in 4 bits on this grid, and what they miss, squared.
float round_to_grid(const float* x, Grid grid, float* whole) {
  const float scale = half_to_float(grid.scale), least = half_to_float(grid.least);
  const float inverse = inverse_of(scale);
  float lane[8] = {};
  for (int64_t c = 0; c < kGroup; c += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      whole[c + i] = rounded((x[c + i] - least) * inverse, 0.0f, kHighest4);
      const float miss = x[c + i] - (scale * whole[c + i] + least);
      lane[i] += miss * miss;
    }
  }
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// The grid of least squared error for these whole numbers.
Grid fitted_grid(const float* x, const float* whole, Grid grid) {
  float sum_x = 0, sum_q = 0, sum_qq = 0, sum_qx = 0;
  for (int64_t c = 0; c < kGroup; ++c) {
    sum_x += x[c];
    sum_q += whole[c];
    sum_qq += whole[c] * whole[c];
    sum_qx += whole[c] * x[c];
  }
  const float spread = kGroup * sum_qq - sum_q * sum_q;
  if (spread <= 0.0f) return grid;
  const float scale = (kGroup * sum_qx - sum_q * sum_x) / spread;
  return {float_to_half(scale), float_to_half((sum_x - scale * sum_q) / kGroup)};
}

Grid best_grid(const float* x, const Range& range) {
  Grid best = {0, 0};
  float least_error = INFINITY, whole[kGroup];
  for (const float spread : kSpreads) {
    const float width = spread * (range.greatest - range.least);
    const float middle = 0.5f * (range.greatest + range.least);
    const float least = spread == 1.0f ? range.least : middle - 0.5f * width;
    Grid grid = {float_to_half(width / kHighest4), float_to_half(least)};
    for (int fit = 0;; ++fit) {
      const float error = round_to_grid(x, grid, whole);
      if (error < least_error) {
        least_error = error;
        best = grid;
      }
      if (fit == kRefits || error == 0.0f) break;
      grid = fitted_grid(x, whole, grid);
    }
  }
  return best;
}

void store_group8(const float* x, float scale, uint8_t* out) {
  const float inverse = inverse_of(scale);
  for (int64_t c = 0; c < kGroup; ++c) {
    out[c] = static_cast<uint8_t>(static_cast<int8_t>(rounded(x[c] * inverse, -127.0f, 127.0f)));
  }
}

void store_group4(const float* whole, uint8_t* out) {
  for (int64_t c = 0; c < kGroup / 2; ++c) {
    const int low = static_cast<int>(whole[c]), high = static_cast<int>(whole[c + kGroup / 2]);
    out[c] = static_cast<uint8_t>(low | high << 4);
  }
}

void load_whole(const uint8_t* q, DType dtype, float* out) {
  if (dtype == DType::q8) {
    for (int64_t c = 0; c < kGroup; ++c) out[c] = static_cast<float>(static_cast<int8_t>(q[c]));
    return;
  }
  for (int64_t c = 0; c < kGroup / 2; ++c) {
    out[c] = static_cast<float>(q[c] & 15);
    out[c + kGroup / 2] = static_cast<float>(q[c] >> 4);
  }
}

template <class Body>
void for_rows(int64_t count, Body&& body) {
  parallel_for((count + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) body(row);
  });
}

}  // namespace

int64_t grouped_row_bytes(DType dtype, int64_t num_columns) {
  return bytes_of(dtype, num_columns) + bytes_of_scales(dtype, num_columns);
}

Matrix grouped_matrix(const void* data, DType dtype, int64_t num_rows, int64_t num_columns,
                      int64_t stride) {
  const void* scale = static_cast<const char*>(data) + bytes_of(dtype, num_columns);
  return {data, dtype, num_rows, num_columns, stride, scale, stride};
}

void quantize(const Matrix& weights, DType dtype, void* rows) {
  const Rows source = weights.rows();
  const int64_t C = weights.num_columns / kGroup, group_bytes = bytes_of(dtype, kGroup);
  const int64_t stride = grouped_row_bytes(dtype, weights.num_columns);
  std::atomic<bool> fits{true};
  for_rows(weights.num_rows, [&](int64_t row) {
    uint8_t* q = static_cast<uint8_t*>(rows) + row * stride;
    uint8_t* scales = q + C * group_bytes;
    float x[kGroup], whole[kGroup];
    for (int64_t g = 0; g < C; ++g) {
      load_group(source, row, g, x);
      const Range range = range_of(x);
      if (!range.is_finite) {
        fits = false;
        return;
      }
      Grid grid = {0, 0};
      if (dtype == DType::q8) {
        grid.scale = float_to_half(std::max(range.greatest, -range.least) / 127.0f);
        store_group8(x, half_to_float(grid.scale), q + g * group_bytes);
      } else {
        grid = best_grid(x, range);
        round_to_grid(x, grid, whole);
        store_group4(whole, q + g * group_bytes);
        std::memcpy(scales + (C + g) * sizeof(grid.least), &grid.least, sizeof(grid.least));
      }
      std::memcpy(scales + g * sizeof(grid.scale), &grid.scale, sizeof(grid.scale));
    }
  });
  if (!fits) {
    throw std::invalid_argument("A weight is not finite, or too large for 8 or 4 bits.");
  }
}

void dequantize(const Matrix& grouped, int64_t begin, int64_t count, DType dtype, void* out) {
  const Rows source = grouped.rows();
  const int64_t C = grouped.num_columns / kGroup;
  const int64_t group_bytes = bytes_of(grouped.dtype, kGroup);
  for_rows(count, [&](int64_t row) {
    const uint8_t* q = static_cast<const uint8_t*>(source.row(begin + row));
    const char* scales = static_cast<const char*>(source.scales(begin + row));
    char* target = static_cast<char*>(out) + bytes_of(dtype, row * grouped.num_columns);
    float x[kGroup];
    for (int64_t g = 0; g < C; ++g) {
      Grid grid = {0, 0};
      std::memcpy(&grid.scale, scales + g * sizeof(grid.scale), sizeof(grid.scale));
      if (grouped.dtype == DType::u4) {
        std::memcpy(&grid.least, scales + (C + g) * sizeof(grid.least), sizeof(grid.least));
      }
      const float scale = half_to_float(grid.scale), least = half_to_float(grid.least);
      load_whole(q + g * group_bytes, grouped.dtype, x);
      for (float& value : x) value = scale * value + least;
      store_floats(x, kGroup, dtype, target + bytes_of(dtype, g * kGroup));
    }
  });
}

}  // namespace hotneuron

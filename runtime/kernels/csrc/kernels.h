// The inner loops of the CPU backend, one table of functions per instruction set.
//
// Nearly everything is built from two of them: `dot_rows` (linear, gate, up, predictor, q k^T) and
// `add_rows` (down, attention's weighted values, sums of partial results). The rest scores copies
// of the gate in few bits. In all of them, one output is computed by the same instructions in the
// same order whatever else is in the call, which is what makes results independent of threads, of
// batch mates and of the sparsity mode.
// Raw pointers, no Python, no allocation. Pointers need no alignment beyond their element's.
#pragma once

#include <cstdint>

namespace hotneuron {

enum class DType { f32, bf16, i8 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1;
}

// How many rows before its use a row should be asked for, in whole tiles of rows.
inline int64_t rows_ahead(int64_t row_bytes, int64_t tile) {
  constexpr int64_t kBytesAhead = 9216;
  const int64_t num_tiles = kBytesAhead / (row_bytes * tile);
  return num_tiles > 1 ? num_tiles * tile : tile;
}

// Rows of a row-major matrix: number i of them is row `index[i]`, or row i if there is no index.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;  // elements from one row to the next
  int64_t width;   // elements of a row that take part
  int64_t count;
  const int32_t* index = nullptr;
  int64_t num_following = 0;           // rows behind these, likely to be read next
  const void* const* ahead = nullptr;  // the row to ask for while row i is read, if not those

  const void* row(int64_t i) const {
    return static_cast<const char*>(data) + i * stride * size_of(dtype);
  }
  // `size` rows from `begin` on; the rest is announced as following.
  Rows part(int64_t begin, int64_t size) const {
    return {row(begin), dtype, stride, width, size, nullptr, count - begin - size};
  }
  // Rows of this matrix by their numbers.
  Rows listed(const int32_t* row_index, int64_t size, const void* const* rows_ahead) const {
    return {data, dtype, stride, width, size, row_index, 0, rows_ahead};
  }
};

constexpr int64_t kGroup = 32;  // columns that share a scale where both sides are whole numbers

// Rows of a gate in 8 or 4 bits, one behind the other: whole numbers, an fp16 scale per group.
// 4-bit numbers are stored plus 8; byte i of a group holds its column i in the low half and column
// i + 16 in the high one.
struct GroupRows {
  const uint8_t* q;
  const uint16_t* scale;
  int bits;
  int64_t num_groups;  // per row
  int64_t count;
  int64_t num_following = 0;  // rows behind these, likely to be read next

  int64_t row_bytes() const { return num_groups * kGroup * bits / 8; }
  GroupRows part(int64_t begin, int64_t size) const {
    return {q + begin * row_bytes(), scale + begin * num_groups, bits, num_groups, size,
            count - begin - size};
  }
};

// A vector in the same groups: int8 and fp32 scales.
struct GroupedInput {
  const int8_t* q;
  const float* scale;
};

struct SoftmaxPart {
  float max, sum;
};

struct Kernels {
  const char* name;

  // y[n, i] = dot(row i, x[n]), or += with `accumulate`. x rows are ldx apart, y rows ldy.
  void (*dot_rows)(const Rows& rows, const float* x, int64_t ldx, int64_t num_tokens, float* y,
                   int64_t ldy, bool accumulate);
  // y[n, :] += coef[n, i] * row i, for i ascending. coef rows are ldc apart.
  void (*add_rows)(const Rows& rows, const float* coef, int64_t ldc, int64_t num_tokens, float* y,
                   int64_t ldy);
  // y = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const void* weight, DType dtype, float eps, int64_t width,
                   float* y);
  // Rounds groups of x: scale = max |x| / 127, at least the smallest normal float; q = x / scale,
  // halves to even. A group with a NaN or an infinity gets the scale NaN.
  void (*round_groups)(const float* x, int64_t num_groups, int8_t* q, float* scale);
  // y[i] = dot(row i, x): exact within a group, groups added in fp32.
  void (*dot_groups)(const GroupRows& rows, const GroupedInput& x, float* y);
  // y[i] = bits in which row i and x agree, less those in which they do not.
  void (*count_signs)(const uint8_t* rows, int64_t row_bytes, int64_t count, const uint8_t* x,
                      float* y);
  // x = exp(scale * x - max) in place; returns that max and the sum.
  SoftmaxPart (*softmax_part)(float* x, float scale, int64_t width);
};

extern const Kernels kGenericKernels;
#ifdef HOTNEURON_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace hotneuron

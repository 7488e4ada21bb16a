// The inner loops of the CPU backend, one table of functions per instruction set.
//
// Nearly everything is built from two of them: `dot_rows` (linear, gate, up, predictors, q k^T) and
// `add_rows` (down, attention's weighted values, sums of partial results). In all of them, one
// output is computed by the same instructions in the same order whatever else is in the call, which
// is what makes results independent of threads, of batch mates and of the sparsity mode.
// Raw pointers, no Python, no allocation. Pointers need no alignment beyond their element's.
#pragma once

#include <cstdint>

namespace hotneuron {

// i8: whole numbers whose scale is the caller's. The others are in groups of kGroup columns:
//   q8   scale * q, q in [-127, 127]
//   u4   scale * q + least, q in [0, 15]
// scale and least are fp16; a row's `least` stand behind its scales. Byte i of a group in 4 bits
// holds its column i in the low half and column i + 16 in the high one.
enum class DType { f32, bf16, i8, q8, u4 };
constexpr int64_t kGroup = 32;

inline bool is_grouped(DType dtype) {
  return dtype == DType::q8 || dtype == DType::u4;
}

inline int64_t bytes_of(DType dtype, int64_t elements) {
  switch (dtype) {
    case DType::f32: return 4 * elements;
    case DType::bf16: return 2 * elements;
    case DType::i8:
    case DType::q8: return elements;
    case DType::u4: return elements / 2;
  }
  return 0;
}

// What stands behind a row of whole numbers: fp16 numbers of each group, in 4 bits two.
inline int64_t bytes_of_scales(DType dtype, int64_t elements) {
  constexpr int64_t kHalfBytes = 2;
  return elements / kGroup * kHalfBytes * (dtype == DType::u4 ? 2 : 1);
}

constexpr int64_t kBytesAhead = 9216;  // how long before its use memory should be asked for

// The same in rows, in whole tiles of them.
inline int64_t rows_ahead(int64_t row_bytes, int64_t tile) {
  const int64_t num_tiles = kBytesAhead / (row_bytes * tile);
  return num_tiles > 1 ? num_tiles * tile : tile;
}

// Rows of a row-major matrix: number i of them is row `index[i]`, or row i if there is no index.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;  // bytes from one row to the next
  int64_t width;   // elements of a row that take part
  int64_t count;
  const void* scale = nullptr;  // of the first row's groups
  int64_t scale_stride = 0;     // bytes
  const int32_t* index = nullptr;
  int64_t num_following = 0;           // rows behind these, likely to be read next
  const void* const* ahead = nullptr;  // the row to ask for while row i is read, if not those

  const void* row(int64_t i) const { return static_cast<const char*>(data) + i * stride; }
  const void* scales(int64_t i) const {
    return static_cast<const char*>(scale) + i * scale_stride;
  }
  int64_t row_bytes() const { return bytes_of(dtype, width); }
  // With its scales, if they stand behind it.
  int64_t record_bytes() const {
    return row_bytes() + (scale_stride == stride ? bytes_of_scales(dtype, width) : 0);
  }
  // `size` rows from `begin` on; the rest is announced as following.
  Rows part(int64_t begin, int64_t size) const {
    Rows rows = *this;
    rows.data = row(begin);
    rows.scale = scales(begin);
    rows.count = size;
    rows.num_following = count - begin - size;
    return rows;
  }
  // Rows of this matrix by their numbers.
  Rows listed(const int32_t* row_index, int64_t size, const void* const* rows_ahead) const {
    Rows rows = *this;
    rows.index = row_index;
    rows.count = size;
    rows.num_following = 0;
    rows.ahead = rows_ahead;
    return rows;
  }
};

// Rows that are always read all, scale * q with q in [-8, 7] stored plus 8: sixteen side by side are a
// strip, the last one filled up with zeros. Of each group a strip has four lines of 64 bytes; line j
// has of each row the bytes 4 j to 4 j + 3 of the group as u4 has it. Scales, in fp16: of each group
// those of the sixteen rows.
constexpr int64_t kStripRows = 16, kStripGroupBytes = kStripRows * kGroup / 2;
struct Strips {
  const uint8_t* data;
  const void* scale;
  int64_t num_rows, num_groups;

  int64_t num_strips() const { return (num_rows + kStripRows - 1) / kStripRows; }
  const uint8_t* data_of(int64_t strip) const {
    return data + strip * num_groups * kStripGroupBytes;
  }
  const void* scales_of(int64_t strip) const {
    constexpr int64_t kScaleBytes = 2;
    return static_cast<const char*>(scale) + strip * num_groups * kStripRows * kScaleBytes;
  }
  // Rows from `begin`, the first of a strip, on.
  Strips part(int64_t begin, int64_t size) const {
    const int64_t strip = begin / kStripRows;
    return {data_of(strip), scales_of(strip), size, num_groups};
  }
};

// Up to kTileTokens rounded vectors side by side, those that are missing as zeros: of each group and
// each four columns the bytes of all tokens; of each group the scales and sums of all tokens.
constexpr int64_t kTileTokens = 16, kTileRows = 16;
struct TokenTile {
  const int8_t* q;
  const float *scale, *sum;
};

// The vectors that rows are multiplied with: as floats, and for grouped rows rounded to int8 in the
// same groups. One behind the other, `ld` elements apart.
struct Vectors {
  const float* x;
  int64_t ld;
  const int8_t* q = nullptr;
  // The same for rows in 4 bits: of four groups (what is left of them at the end) the first 16
  // columns of each, then the others.
  const int8_t* q_halves = nullptr;
  const float* scale = nullptr;    // one per group
  const int32_t* total = nullptr;  // sum of a group's q
  const float* sum = nullptr;      // scale * total
  const TokenTile* tiles = nullptr;  // all of them again, if the kernels want tiles

  Vectors from(int64_t first) const {
    const int64_t at = first * ld, group = at / kGroup;
    return {x + at, ld, q + at, q_halves + at, scale + group, total + group, sum + group};
  }
};

// Where one vector is rounded to; as in Vectors.
struct RoundedVector {
  int8_t *q, *q_halves;
  float* scale;
  int32_t* total;
  float* sum;
};

// Floats of a vector that rows are added up in.
inline int64_t width_of_sums(DType dtype, int64_t width) {
  constexpr int64_t kAtOnce = 16;  // groups
  if (dtype != DType::u4) return width;
  return width + (width / kGroup + kAtOnce - 1) / kAtOnce * kAtOnce;
}

struct SoftmaxPart {
  float max, sum;
};

struct Kernels {
  const char* name;
  // From so many tokens on, grouped rows are multiplied with all of a tile's tokens in no more time
  // than with a few. No such number: 0.
  int64_t tile_from;

  // y[n, i] = dot(row i, x[n]), or += with `accumulate`. y rows are ldy apart. Of grouped rows the
  // sum within a group is exact, and groups are added in fp32.
  void (*dot_rows)(const Rows& rows, const Vectors& x, int64_t num_tokens, float* y, int64_t ldy,
                   bool accumulate);
  // y[n, i] = dot(row i, x[n]); as above for grouped rows.
  void (*dot_strips)(const Strips& strips, const Vectors& x, int64_t num_tokens, float* y,
                     int64_t ldy);
  // y[n, :] += coef[n, i] * row i, for i ascending. coef rows are ldc apart. Of rows in 4 bits, what
  // their groups have at least is one number for all their columns: it is added up behind those of
  // y[n] (width_of_sums), and add_least adds it to them in the end.
  void (*add_rows)(const Rows& rows, const float* coef, int64_t ldc, int64_t num_tokens, float* y,
                   int64_t ldy);
  // y[c] += y[width + c / kGroup] for all columns.
  void (*add_least)(float* y, int64_t width);
  // y = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const void* weight, DType dtype, float eps, int64_t width,
                   float* y);
  // Rounds the groups of one x: scale = max |x| / 127, at least the smallest normal float;
  // q = x / scale, halves to even. A group with a NaN or an infinity gets the scale NaN.
  void (*round_groups)(const float* x, int64_t num_groups, const RoundedVector& out);
  // y[i] = bits in which row i and x agree, less those in which they do not.
  void (*count_signs)(const uint8_t* rows, int64_t row_bytes, int64_t count, const uint8_t* x,
                      float* y);
  // x = exp(scale * x - max) in place; returns that max and the sum.
  SoftmaxPart (*softmax_part)(float* x, float scale, int64_t width);
  // h = gate / (1 + exp(-gate)) * up
  void (*silu_times)(const float* gate, const float* up, int64_t width, float* h);
};

extern const Kernels kGenericKernels;
#ifdef HOTNEURON_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAmxKernels;  // the same bits as kAvx512VnniKernels
#endif

}  // namespace hotneuron

// The inner loops, written once over `Vec` and compiled per instruction set (kernels_*.cpp).
//
// Everything is in an unnamed namespace and uses no standard C++ library, so that no code compiled
// for one instruction set can be linked into another's path. No option that lets the compiler
// reorder or fuse floating point operations may be set for these files.

namespace {

using hotneuron::DType;
using hotneuron::Rows;
using hotneuron::SoftmaxPart;
using Reg = Vec::Reg;

constexpr int kWidth = Vec::kWidth;
constexpr int kRowTile = 4;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows are a page or less each, and several are read at once: too little of a stream for the
// hardware to see. So while a line of a row is used, the same line of a row further on is asked
// for. Not more at a time: a burst of requests is slower than none (measured on Zen 5, as is the
// distance).
constexpr int64_t kLineBytes = 64;

template <class W>
inline const W* row_at(const Rows& rows, int64_t i) {
  const int64_t row = rows.index ? rows.index[i] : i;
  return static_cast<const W*>(rows.data) + row * rows.stride;
}

template <class W>
inline const W* row_ahead(const Rows& rows, int64_t i, int64_t tile) {
  if (rows.ahead) return static_cast<const W*>(rows.ahead[i]);
  const int64_t row_bytes = rows.width * static_cast<int64_t>(sizeof(W));
  const int64_t distance = hotneuron::rows_ahead(row_bytes, tile);
  return row_at<W>(rows, smaller(i + distance, rows.count + rows.num_following - 1));
}

// out[t][r] = dot(row r, x_t): one vector accumulator per output, columns ascending, then the
// fixed tree of Vec::sum4.
template <class W, int kTokens>
inline void dot_tile(const W* const* row, const W* const* ahead, int64_t width, const float* x,
                     int64_t ldx, float (*out)[kRowTile]) {
  constexpr int64_t kLine = kLineBytes / sizeof(W);
  Reg sum[kTokens][kRowTile];
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRowTile; ++r) sum[t][r] = Vec::set1(0.0f);

  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    if (c % kLine == 0) {
      for (int r = 0; r < kRowTile; ++r) __builtin_prefetch(ahead[r] + c);
    }
    Reg weight[kRowTile];
    for (int r = 0; r < kRowTile; ++r) weight[r] = Vec::load(row[r] + c);
    for (int t = 0; t < kTokens; ++t) {
      const Reg input = Vec::load(x + t * ldx + c);
      for (int r = 0; r < kRowTile; ++r) sum[t][r] = Vec::fma(weight[r], input, sum[t][r]);
    }
  }
  if (c < width) {
    Reg weight[kRowTile];
    for (int r = 0; r < kRowTile; ++r) weight[r] = Vec::load(row[r] + c, width - c);
    for (int t = 0; t < kTokens; ++t) {
      const Reg input = Vec::load(x + t * ldx + c, width - c);
      for (int r = 0; r < kRowTile; ++r) sum[t][r] = Vec::fma(weight[r], input, sum[t][r]);
    }
  }
  for (int t = 0; t < kTokens; ++t) Vec::sum4(sum[t], out[t]);
}

template <class W, int kTokens>
inline void dot_tokens(const W* const* row, const W* const* ahead, int64_t num_rows, int64_t width,
                       const float* x, int64_t ldx, float* y, int64_t ldy, bool accumulate) {
  float out[kTokens][kRowTile];
  dot_tile<W, kTokens>(row, ahead, width, x, ldx, out);
  for (int t = 0; t < kTokens; ++t) {
    for (int64_t r = 0; r < num_rows; ++r) {
      y[t * ldy + r] = accumulate ? y[t * ldy + r] + out[t][r] : out[t][r];
    }
  }
}

// A tile of rows stays in the first cache while all tokens use it.
template <class W>
void dot_rows(const Rows& rows, const float* x, int64_t ldx, int64_t num_tokens, float* y,
              int64_t ldy, bool accumulate) {
  for (int64_t i = 0; i < rows.count; i += kRowTile) {
    const int64_t num_rows = smaller(rows.count - i, kRowTile);
    const W *row[kRowTile], *ahead[kRowTile];
    for (int r = 0; r < kRowTile; ++r) {
      row[r] = row_at<W>(rows, i + smaller(r, num_rows - 1));  // a short tile repeats its last row
      ahead[r] = row_ahead<W>(rows, i + smaller(r, num_rows - 1), kRowTile);
    }
    int64_t t = 0;
    for (; t + Vec::kTokenTile <= num_tokens; t += Vec::kTokenTile) {
      dot_tokens<W, Vec::kTokenTile>(row, t == 0 ? ahead : row, num_rows, rows.width, x + t * ldx,
                                     ldx, y + t * ldy + i, ldy, accumulate);
    }
    for (; t < num_tokens; ++t) {
      dot_tokens<W, 1>(row, t == 0 ? ahead : row, num_rows, rows.width, x + t * ldx, ldx,
                       y + t * ldy + i, ldy, accumulate);
    }
  }
}

void dot_rows_any(const Rows& rows, const float* x, int64_t ldx, int64_t num_tokens, float* y,
                  int64_t ldy, bool accumulate) {
  switch (rows.dtype) {
    case DType::f32: return dot_rows<float>(rows, x, ldx, num_tokens, y, ldy, accumulate);
    case DType::bf16: return dot_rows<Bf16>(rows, x, ldx, num_tokens, y, ldy, accumulate);
    case DType::i8: return dot_rows<int8_t>(rows, x, ldx, num_tokens, y, ldy, accumulate);
  }
}

// y_t += sum over kRows rows, one fma per row in their order: the tile sizes change no bit.
template <class W, int kRows, int kTokens>
inline void add_tile(const Rows& rows, int64_t begin, const float* coef, int64_t ldc, float* y,
                     int64_t ldy) {
  constexpr int64_t kLine = kLineBytes / sizeof(W);
  const W *row[kRows], *ahead[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = row_at<W>(rows, begin + r);
    ahead[r] = row_ahead<W>(rows, begin + r, kRows);
  }

  int64_t c = 0;
  for (; c + kWidth <= rows.width; c += kWidth) {
    if (c % kLine == 0) {
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(ahead[r] + c);
    }
    Reg weight[kRows];
    for (int r = 0; r < kRows; ++r) weight[r] = Vec::load(row[r] + c);
    for (int t = 0; t < kTokens; ++t) {
      Reg sum = Vec::load(y + t * ldy + c);
      for (int r = 0; r < kRows; ++r) {
        sum = Vec::fma(Vec::set1(coef[t * ldc + begin + r]), weight[r], sum);
      }
      Vec::store(y + t * ldy + c, sum);
    }
  }
  if (c < rows.width) {
    const int64_t rest = rows.width - c;
    for (int t = 0; t < kTokens; ++t) {
      Reg sum = Vec::load(y + t * ldy + c, rest);
      for (int r = 0; r < kRows; ++r) {
        sum = Vec::fma(Vec::set1(coef[t * ldc + begin + r]), Vec::load(row[r] + c, rest), sum);
      }
      Vec::store(y + t * ldy + c, sum, rest);
    }
  }
}

template <class W, int kTokens>
void add_rows_tokens(const Rows& rows, const float* coef, int64_t ldc, float* y, int64_t ldy) {
  int64_t i = 0;
  for (; i + 8 <= rows.count; i += 8) add_tile<W, 8, kTokens>(rows, i, coef, ldc, y, ldy);
  for (; i + 4 <= rows.count; i += 4) add_tile<W, 4, kTokens>(rows, i, coef, ldc, y, ldy);
  for (; i < rows.count; ++i) add_tile<W, 1, kTokens>(rows, i, coef, ldc, y, ldy);
}

template <class W>
void add_rows(const Rows& rows, const float* coef, int64_t ldc, int64_t num_tokens, float* y,
              int64_t ldy) {
  int64_t t = 0;
  for (; t + Vec::kTokenTile <= num_tokens; t += Vec::kTokenTile) {
    add_rows_tokens<W, Vec::kTokenTile>(rows, coef + t * ldc, ldc, y + t * ldy, ldy);
  }
  for (; t < num_tokens; ++t) {
    add_rows_tokens<W, 1>(rows, coef + t * ldc, ldc, y + t * ldy, ldy);
  }
}

void add_rows_any(const Rows& rows, const float* coef, int64_t ldc, int64_t num_tokens, float* y,
                  int64_t ldy) {
  switch (rows.dtype) {
    case DType::f32: return add_rows<float>(rows, coef, ldc, num_tokens, y, ldy);
    case DType::bf16: return add_rows<Bf16>(rows, coef, ldc, num_tokens, y, ldy);
    case DType::i8: return add_rows<int8_t>(rows, coef, ldc, num_tokens, y, ldy);
  }
}

inline float sum_lanes(Reg v) {
  const Reg padded[4] = {v, v, v, v};
  float sums[4];
  Vec::sum4(padded, sums);
  return sums[0];
}

template <class W>
void rms_norm(const float* x, const W* weight, float eps, int64_t width, float* y) {
  Reg squares = Vec::set1(0.0f);
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    const Reg v = Vec::load(x + c);
    squares = Vec::fma(v, v, squares);
  }
  if (c < width) {
    const Reg v = Vec::load(x + c, width - c);
    squares = Vec::fma(v, v, squares);
  }
  const float mean = sum_lanes(squares) / static_cast<float>(width);
  const Reg scale = Vec::set1(1.0f / __builtin_sqrtf(mean + eps));
  c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    Vec::store(y + c, Vec::mul(Vec::mul(Vec::load(x + c), scale), Vec::load(weight + c)));
  }
  if (c < width) {
    const int64_t rest = width - c;
    const Reg v = Vec::mul(Vec::mul(Vec::load(x + c, rest), scale), Vec::load(weight + c, rest));
    Vec::store(y + c, v, rest);
  }
}

void rms_norm_any(const float* x, const void* weight, DType dtype, float eps, int64_t width,
                  float* y) {
  if (dtype == DType::f32) {
    rms_norm(x, static_cast<const float*>(weight), eps, width, y);
  } else {
    rms_norm(x, static_cast<const Bf16*>(weight), eps, width, y);
  }
}

// exp for x <= 0, as Cephes' expf: 2^n * (1 + r + r^2 p(r)), r = x - n ln 2 in two pieces.
inline Reg exp_nonpositive(Reg x) {
  x = Vec::max(Vec::set1(-87.0f), x);  // in this order a NaN stays one
  const Reg n = Vec::round(Vec::mul(x, Vec::set1(1.44269504088896341f)));
  Reg r = Vec::fma(n, Vec::set1(-0.693359375f), x);
  r = Vec::fma(n, Vec::set1(2.12194440e-4f), r);
  Reg p = Vec::set1(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set1(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set1(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set1(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set1(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set1(5.0000001201e-1f));
  p = Vec::fma(Vec::mul(r, r), p, Vec::add(r, Vec::set1(1.0f)));
  return Vec::mul(p, Vec::pow2(n));
}

SoftmaxPart softmax_part(float* x, float scale, int64_t width) {
  float max = x[0];
  for (int64_t i = 1; i < width; ++i) max = x[i] > max ? x[i] : max;
  max *= scale;
  const Reg scale_v = Vec::set1(scale), minus_max = Vec::set1(-max);
  Reg sum = Vec::set1(0.0f);
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    const Reg e = exp_nonpositive(Vec::add(Vec::mul(Vec::load(x + c), scale_v), minus_max));
    Vec::store(x + c, e);
    sum = Vec::add(sum, e);
  }
  float total = sum_lanes(sum);
  if (c < width) {
    const int64_t rest = width - c;
    const Reg e = exp_nonpositive(Vec::add(Vec::mul(Vec::load(x + c, rest), scale_v), minus_max));
    Vec::store(x + c, e, rest);
    for (int64_t i = 0; i < rest; ++i) total += x[c + i];
  }
  return {max, total};
}

}  // namespace

namespace hotneuron {

extern const Kernels HOTNEURON_TABLE;
const Kernels HOTNEURON_TABLE = {HOTNEURON_NAME, dot_rows_any, add_rows_any, rms_norm_any,
                                 softmax_part};

}  // namespace hotneuron

// The inner loops, written once over `Vec` and compiled per instruction set (kernels_*.cpp).
//
// Everything is in an unnamed namespace and uses no standard C++ library, so that no code compiled
// for one instruction set can be linked into another's path. No option that lets the compiler
// reorder or fuse floating point operations may be set for these files.

namespace {

using hotneuron::DType;
using hotneuron::kGroup;
using hotneuron::RoundedVector;
using hotneuron::Rows;
using hotneuron::SoftmaxPart;
using hotneuron::Strips;
using hotneuron::Vectors;
using Reg = Vec::Reg;

constexpr int kWidth = Vec::kWidth;
constexpr int kRowTile = 4;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t number_of(const Rows& rows, int64_t i) { return rows.index ? rows.index[i] : i; }

template <class W>
inline const W* row_at(const Rows& rows, int64_t i) {
  return static_cast<const W*>(rows.row(number_of(rows, i)));
}

inline int64_t distance_ahead(const Rows& rows, int64_t tile) {
  return hotneuron::rows_ahead(rows.row_bytes(), tile);
}

template <class W>
inline const W* row_ahead(const Rows& rows, int64_t i, int64_t distance) {
  if (rows.ahead) return static_cast<const W*>(rows.ahead[i]);
  return row_at<W>(rows, smaller(i + distance, rows.count + rows.num_following - 1));
}

// out[t][r] = dot(row r, x_t): one vector accumulator per output, columns ascending, then the
// fixed tree of Vec::sum4.
template <class W, int kTokens>
inline void dot_tile(const W* const* row, const W* const* ahead, int64_t width, const float* x,
                     int64_t ldx, float (*out)[kRowTile]) {
  constexpr int64_t kLine = kLineBytes / sizeof(W);
  Reg sum[kTokens][kRowTile];
  UNROLL
  for (int t = 0; t < kTokens; ++t) {
    UNROLL
    for (int r = 0; r < kRowTile; ++r) sum[t][r] = Vec::set1(0.0f);
  }

  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    if (c % kLine == 0) {
      UNROLL
      for (int r = 0; r < kRowTile; ++r) ask_for(ahead[r] + c);
    }
    Reg weight[kRowTile];
    UNROLL
    for (int r = 0; r < kRowTile; ++r) weight[r] = Vec::load(row[r] + c);
    UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const Reg input = Vec::load(x + t * ldx + c);
      UNROLL
      for (int r = 0; r < kRowTile; ++r) sum[t][r] = Vec::fma(weight[r], input, sum[t][r]);
    }
  }
  if (c < width) {
    Reg weight[kRowTile];
    UNROLL
    for (int r = 0; r < kRowTile; ++r) weight[r] = Vec::load(row[r] + c, width - c);
    UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const Reg input = Vec::load(x + t * ldx + c, width - c);
      UNROLL
      for (int r = 0; r < kRowTile; ++r) sum[t][r] = Vec::fma(weight[r], input, sum[t][r]);
    }
  }
  UNROLL
  for (int t = 0; t < kTokens; ++t) Vec::sum4(sum[t], out[t]);
}

// What `dot_rows` does with one tile of rows; a tile stays in the first cache while all tokens use
// it.
template <class W>
struct DotTile {
  const W* row[kRowTile];
  const W* ahead[kRowTile];
  int64_t num_rows, width;
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;
  bool accumulate;

  template <int kTokens>
  void run(int64_t t) const {
    float out[kTokens][kRowTile];
    dot_tile<W, kTokens>(row, t == 0 ? ahead : row, width, x + t * ldx, ldx, out);
    UNROLL
    for (int k = 0; k < kTokens; ++k) {
      float* y_t = y + (t + k) * ldy;
      for (int64_t r = 0; r < num_rows; ++r) y_t[r] = accumulate ? y_t[r] + out[k][r] : out[k][r];
    }
  }
};

// Calls work.run<k>(t) for tokens 0..num_tokens in tiles of at most Vec::kTokenTile.
template <class Work>
inline void for_token_tiles(const Work& work, int64_t num_tokens) {
  int64_t t = 0;
  for (; t + Vec::kTokenTile <= num_tokens; t += Vec::kTokenTile) {
    work.template run<Vec::kTokenTile>(t);
  }
  if (num_tokens - t == 3) return work.template run<3>(t);
  if (num_tokens - t == 2) return work.template run<2>(t);
  if (num_tokens - t == 1) return work.template run<1>(t);
}

template <class W>
void dot_rows(const Rows& rows, const float* x, int64_t ldx, int64_t num_tokens, float* y,
              int64_t ldy, bool accumulate) {
  const int64_t distance = distance_ahead(rows, kRowTile);
  for (int64_t i = 0; i < rows.count; i += kRowTile) {
    const int64_t num_rows = smaller(rows.count - i, kRowTile);
    DotTile<W> tile = {{}, {}, num_rows, rows.width, x, ldx, y + i, ldy, accumulate};
    UNROLL
    for (int r = 0; r < kRowTile; ++r) {
      const int64_t row = i + smaller(r, num_rows - 1);  // a short tile repeats its last row
      tile.row[r] = row_at<W>(rows, row);
      tile.ahead[r] = row_ahead<W>(rows, row, distance);
    }
    for_token_tiles(tile, num_tokens);
  }
}

#include "dot_groups.inl"
#include "strips.inl"

void dot_rows_any(const Rows& rows, const Vectors& x, int64_t num_tokens, float* y, int64_t ldy,
                  bool accumulate) {
  switch (rows.dtype) {
    case DType::f32: return dot_rows<float>(rows, x.x, x.ld, num_tokens, y, ldy, accumulate);
    case DType::bf16: return dot_rows<Bf16>(rows, x.x, x.ld, num_tokens, y, ldy, accumulate);
    case DType::i8: return dot_rows<int8_t>(rows, x.x, x.ld, num_tokens, y, ldy, accumulate);
    case DType::q8: return dot_groups<DType::q8>(rows, x, num_tokens, y, ldy, accumulate);
    case DType::u4: return dot_groups<DType::u4>(rows, x, num_tokens, y, ldy, accumulate);
  }
}

// y_t += sum over kRows rows, one fma per row in their order: the tile sizes change no bit.
template <class W, int kRows, int kTokens>
inline void add_tile(const Rows& rows, int64_t begin, int64_t distance, const float* coef,
                     int64_t ldc, float* y, int64_t ldy) {
  constexpr int64_t kLine = kLineBytes / sizeof(W);
  const W *row[kRows], *ahead[kRows];
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    row[r] = row_at<W>(rows, begin + r);
    ahead[r] = row_ahead<W>(rows, begin + r, distance);
  }

  int64_t c = 0;
  for (; c + kWidth <= rows.width; c += kWidth) {
    if (c % kLine == 0) {
      UNROLL
      for (int r = 0; r < kRows; ++r) ask_for(ahead[r] + c);
    }
    Reg weight[kRows];
    UNROLL
    for (int r = 0; r < kRows; ++r) weight[r] = Vec::load(row[r] + c);
    UNROLL
    for (int t = 0; t < kTokens; ++t) {
      Reg sum = Vec::load(y + t * ldy + c);
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum = Vec::fma(Vec::set1(coef[t * ldc + begin + r]), weight[r], sum);
      }
      Vec::store(y + t * ldy + c, sum);
    }
  }
  if (c < rows.width) {
    const int64_t rest = rows.width - c;
    UNROLL
    for (int t = 0; t < kTokens; ++t) {
      Reg sum = Vec::load(y + t * ldy + c, rest);
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum = Vec::fma(Vec::set1(coef[t * ldc + begin + r]), Vec::load(row[r] + c, rest), sum);
      }
      Vec::store(y + t * ldy + c, sum, rest);
    }
  }
}

template <class W>
struct AddRows {
  const Rows& rows;
  const float* coef;
  int64_t ldc;
  float* y;
  int64_t ldy;

  template <int kTokens>
  void run(int64_t t) const {
    const float* c = coef + t * ldc;
    float* y_t = y + t * ldy;
    const int64_t distance = distance_ahead(rows, 8);
    int64_t i = 0;
    for (; i + 8 <= rows.count; i += 8)
      add_tile<W, 8, kTokens>(rows, i, distance, c, ldc, y_t, ldy);
    for (; i + 4 <= rows.count; i += 4)
      add_tile<W, 4, kTokens>(rows, i, distance, c, ldc, y_t, ldy);
    for (; i < rows.count; ++i) add_tile<W, 1, kTokens>(rows, i, distance, c, ldc, y_t, ldy);
  }
};

template <class W>
void add_rows(const Rows& rows, const float* coef, int64_t ldc, int64_t num_tokens, float* y,
              int64_t ldy) {
  for_token_tiles(AddRows<W>{rows, coef, ldc, y, ldy}, num_tokens);
}

// Two registers of a group's whole numbers: its columns from c and from c + kApart on.
template <DType kType>
struct GroupColumns {
  static constexpr int64_t kBytes = kType == DType::q8 ? kGroup : kGroup / 2;
  static constexpr int kApart = kType == DType::q8 ? kWidth : kGroup / 2;
  static constexpr int kStep = kType == DType::q8 ? 2 * kWidth : kWidth;
  static constexpr int kEnd = kType == DType::q8 ? kGroup : kGroup / 2;

  static void load(const uint8_t* q, int c, Reg* first, Reg* second) {
    if constexpr (kType == DType::q8) {
      const int8_t* whole = reinterpret_cast<const int8_t*>(q);
      *first = Vec::load(whole + c);
      *second = Vec::load(whole + c + kApart);
    } else {
      Vec::load_nibbles(q + c, first, second);
    }
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// y += (coef scale) q for kRows rows in their order, and least_C += coef least.
template <DType kType, int kRows>
inline void add_group_tile(const Rows& rows, int64_t first_row, int64_t distance,
                           const float* coef, float* y) {
  using Columns = GroupColumns<kType>;
  constexpr int64_t kBytes = Columns::kBytes;
  const int64_t C = rows.width / kGroup;
  float* least_C = y + rows.width;
  const uint8_t *row[kRows], *ahead[kRows];
  const Half* scale[kRows];
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    row[r] = row_at<uint8_t>(rows, first_row + r);
    scale[r] = static_cast<const Half*>(rows.scales(number_of(rows, first_row + r)));
    ahead[r] = row_ahead<uint8_t>(rows, first_row + r, distance);
    ask_for_rest(ahead[r], rows.row_bytes(), rows.record_bytes());
  }
  for (int64_t first = 0; first < C; first += kScales) {
    const int64_t last = smaller(first + kScales, C);
    alignas(64) float product[kRows][kScales];
    for (int r = 0; r < kRows; ++r) {
      scale_by(scale[r] + first, coef[r], last - first, product[r]);
      if (kType == DType::u4) {
        add_halves(scale[r] + C + first, coef[r], last - first, least_C + first);
      }
    }
    for (int64_t g = first; g < last; ++g) {
      if (g * kBytes % kLineBytes == 0) {
        UNROLL
        for (int r = 0; r < kRows; ++r) ask_for(ahead[r] + g * kBytes);
      }
      float* y_g = y + g * kGroup;
      UNROLL
      for (int c = 0; c < Columns::kEnd; c += Columns::kStep) {
        Reg one = Vec::load(y_g + c), two = Vec::load(y_g + c + Columns::kApart);
        UNROLL
        for (int r = 0; r < kRows; ++r) {
          const Reg times = Vec::set1(product[r][g - first]);
          Reg q_one, q_two;
          Columns::load(row[r] + g * kBytes, c, &q_one, &q_two);
          one = Vec::fma(times, q_one, one);
          two = Vec::fma(times, q_two, two);
        }
        Vec::store(y_g + c, one);
        Vec::store(y_g + c + Columns::kApart, two);
      }
    }
  }
}

template <DType kType>
void add_groups(const Rows& rows, const float* coef, int64_t ldc, int64_t num_tokens, float* y,
                int64_t ldy) {
  const int64_t distance = distance_ahead(rows, 4);
  for (int64_t t = 0; t < num_tokens; ++t, coef += ldc, y += ldy) {
    int64_t i = 0;
    for (; i + 4 <= rows.count; i += 4) {
      add_group_tile<kType, 4>(rows, i, distance, coef + i, y);
    }
    const auto rest = [&](auto num_rows) {
      constexpr int kRows = decltype(num_rows)::value;
      add_group_tile<kType, kRows>(rows, i, distance, coef + i, y);
    };
    if (rows.count - i == 3) rest(Constant<3>{});
    if (rows.count - i == 2) rest(Constant<2>{});
    if (rows.count - i == 1) rest(Constant<1>{});
  }
}

void add_least(float* y, int64_t width) {
  for (int64_t g = 0; g < width / kGroup; ++g) {
    float* y_g = y + g * kGroup;
    for (int64_t c = 0; c < kGroup; c += kWidth) {
      Vec::store(y_g + c, Vec::add(Vec::load(y_g + c), Vec::set1(y[width + g])));
    }
  }
}

void add_rows_any(const Rows& rows, const float* coef, int64_t ldc, int64_t num_tokens, float* y,
                  int64_t ldy) {
  switch (rows.dtype) {
    case DType::f32: return add_rows<float>(rows, coef, ldc, num_tokens, y, ldy);
    case DType::bf16: return add_rows<Bf16>(rows, coef, ldc, num_tokens, y, ldy);
    case DType::i8: return add_rows<int8_t>(rows, coef, ldc, num_tokens, y, ldy);
    case DType::q8: return add_groups<DType::q8>(rows, coef, ldc, num_tokens, y, ldy);
    case DType::u4: return add_groups<DType::u4>(rows, coef, ldc, num_tokens, y, ldy);
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

void round_groups(const float* x, int64_t num_groups, const RoundedVector& out) {
  constexpr int kRegs = kGroup / kWidth;
  constexpr int64_t kHalf = kGroup / 2, kQuad = 4;
  for (int64_t g = 0; g < num_groups; ++g, x += kGroup) {
    Reg value[kRegs], sizes = Vec::set1(0.0f);
    bool is_finite = true;
    UNROLL
    for (int i = 0; i < kRegs; ++i) {
      value[i] = Vec::load(x + i * kWidth);
      sizes = Vec::max(sizes, Vec::max(value[i], Vec::mul(value[i], Vec::set1(-1.0f))));
      is_finite = is_finite && Vec::all_finite(value[i]);
    }
    const float step = Vec::max_lanes(sizes) / 127.0f;
    const float scale = step < __FLT_MIN__ ? __FLT_MIN__ : step;
    Reg total = Vec::set1(0.0f);
    int8_t* q = out.q + g * kGroup;
    UNROLL
    for (int i = 0; i < kRegs; ++i) {
      Reg whole = Vec::set1(0.0f);
      if (is_finite) whole = Vec::round(Vec::div(value[i], Vec::set1(scale)));
      Vec::store_whole(q + i * kWidth, whole);
      total = Vec::add(total, whole);
    }
    const int64_t in_quad = g % kQuad, quad = g - in_quad;
    int8_t* halves = out.q_halves + quad * kGroup + in_quad * kHalf;
    __builtin_memcpy(halves, q, kHalf);
    __builtin_memcpy(halves + smaller(kQuad, num_groups - quad) * kHalf, q + kHalf, kHalf);
    const float exact_total = sum_lanes(total);
    out.scale[g] = is_finite ? scale : __builtin_nanf("");
    out.total[g] = static_cast<int32_t>(exact_total);
    out.sum[g] = out.scale[g] * exact_total;
  }
}

void count_signs(const uint8_t* rows, int64_t row_bytes, int64_t count, const uint8_t* x,
                 float* y) {
  for (int64_t i = 0; i < count; ++i, rows += row_bytes) {
    int64_t differ = 0, b = 0;
    for (; b + 8 <= row_bytes; b += 8) {
      uint64_t ours, theirs;
      __builtin_memcpy(&ours, rows + b, sizeof(ours));
      __builtin_memcpy(&theirs, x + b, sizeof(theirs));
      differ += __builtin_popcountll(ours ^ theirs);
    }
    for (; b < row_bytes; ++b) differ += __builtin_popcount(rows[b] ^ x[b]);
    y[i] = static_cast<float>(8 * row_bytes - 2 * differ);
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

inline float max_of(const float* x, int64_t width) {
  float max = x[0];
  int64_t c = 0;
  if (width >= kWidth) {
    Reg maxima = Vec::load(x);
    for (c = kWidth; c + kWidth <= width; c += kWidth) maxima = Vec::max(maxima, Vec::load(x + c));
    float lane[kWidth];
    Vec::store(lane, maxima);
    for (int i = 0; i < kWidth; ++i) max = lane[i] > max ? lane[i] : max;
  }
  for (; c < width; ++c) max = x[c] > max ? x[c] : max;
  return max;
}

SoftmaxPart softmax_part(float* x, float scale, int64_t width) {
  const float max = scale * max_of(x, width);
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

// gate / (1 + e^-gate) = gate e^-|gate| / (1 + e^-|gate|) below zero, gate / (1 + e^-|gate|) above.
inline Reg silu(Reg gate) {
  const Reg minus = Vec::mul(gate, Vec::set1(-1.0f));
  const Reg e = exp_nonpositive(Vec::mul(Vec::max(gate, minus), Vec::set1(-1.0f)));
  const Reg above = Vec::max(gate, Vec::set1(0.0f));
  // one of the two terms is zero
  const Reg below = Vec::mul(Vec::add(gate, Vec::mul(above, Vec::set1(-1.0f))), e);
  return Vec::div(Vec::add(above, below), Vec::add(Vec::set1(1.0f), e));
}

void silu_times(const float* gate, const float* up, int64_t width, float* h) {
  int64_t c = 0;
  for (; c + kWidth <= width; c += kWidth) {
    Vec::store(h + c, Vec::mul(silu(Vec::load(gate + c)), Vec::load(up + c)));
  }
  if (c < width) {
    const int64_t rest = width - c;
    const Reg product = Vec::mul(silu(Vec::load(gate + c, rest)), Vec::load(up + c, rest));
    Vec::store(h + c, product, rest);
  }
}

}  // namespace

namespace hotneuron {

extern const Kernels HOTNEURON_TABLE;
const Kernels HOTNEURON_TABLE = {HOTNEURON_NAME, kTileFrom,    dot_rows_any, dot_strips,
                                 add_rows_any,   add_least,    rms_norm_any, round_groups,
                                 count_signs,    softmax_part, silu_times};

}  // namespace hotneuron

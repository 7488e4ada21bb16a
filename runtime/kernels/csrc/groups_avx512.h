// Dot products of grouped rows with AVX-512: up to sixteen groups at a time.
//
// Bytes are multiplied and added up in whole numbers until each of the sixteen groups has its sum in
// a lane of its own; then one conversion and one fma scale them all. Where HOTNEURON_VNNI is defined
// four products are added by one instruction, elsewhere by two with a 16-bit step between; sums are
// whole, so both give the same bits.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "prefetch.h"
#include "simd_avx512.h"
#include "unroll.h"

namespace {

using hotneuron::DType;
using hotneuron::kGroup;
using hotneuron::Vectors;

// acc + products of unsigned and signed bytes in sums of four; acc starts at zero without VNNI.
inline __m512i add_fours(__m512i acc, __m512i unsigned_bytes, __m512i signed_bytes) {
#ifdef HOTNEURON_VNNI
  return _mm512_dpbusd_epi32(acc, unsigned_bytes, signed_bytes);
#else
  const __m512i twos = _mm512_maddubs_epi16(unsigned_bytes, signed_bytes);
  return _mm512_add_epi32(acc, _mm512_madd_epi16(twos, _mm512_set1_epi16(1)));
#endif
}

// Sums of two neighbours, a's and b's in turns of 64 bits.
inline __m512i add_neighbours(__m512i a, __m512i b) {
  const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
  return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                          _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xDD)));
}
// The same for numbers that fit 16 bits.
inline __m512i add_small_neighbours(__m512i a, __m512i b) {
  return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
}

// A mask of the bytes of `groups` groups, as far as they are one register.
inline __mmask64 bytes_of_groups(int64_t groups, int64_t group_bytes) {
  const int64_t count = groups * group_bytes;
  if (count <= 0) return 0;
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// 64 bytes of a row: kGroups groups, whose sums are spread over 16 / kGroups lanes each. As many
// pieces as have sixteen groups are added up together.
template <DType kType>
struct Piece;

template <>
struct Piece<DType::q8> {
  static constexpr int kGroups = 2;
  __m512i q;

  void load(const uint8_t* p, __mmask64 mask) { set(_mm512_maskz_loadu_epi8(mask, p)); }
  void load(const uint8_t* p) { set(_mm512_loadu_si512(p)); }

#ifdef HOTNEURON_VNNI
  // Plus 128, which makes them unsigned.
  static constexpr int kTooMuchBits = 7;
  void set(__m512i bytes) { q = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
  __m512i dot(__m512i x) const { return add_fours(_mm512_setzero_si512(), q, x); }
#else
  // The sign goes to x, or two products could exceed 16 bits.
  static constexpr int kTooMuchBits = 0;
  void set(__m512i bytes) { q = bytes; }
  __m512i dot(__m512i x) const {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(q), zero, x);
    return add_fours(zero, _mm512_abs_epi8(q), signed_x);
  }
#endif
  __m512i dot(const int8_t* x) const { return dot(_mm512_loadu_si512(x)); }
  // x: what is left of a vector's groups from this piece on.
  __m512i dot_rest(const int8_t* x, int64_t groups) const {
    return dot(_mm512_maskz_loadu_epi8(bytes_of_groups(groups, kGroup), x));
  }

  // A lane per group. A quarter of a register holds half the lanes of one group of each piece.
  static __m512i group_sums(const __m512i* sums) {
    const __m512i first = add_neighbours(add_neighbours(sums[0], sums[1]),
                                         add_neighbours(sums[2], sums[3]));
    const __m512i second = add_neighbours(add_neighbours(sums[4], sums[5]),
                                          add_neighbours(sums[6], sums[7]));
    const __m512i joined = _mm512_add_epi32(_mm512_shuffle_i64x2(first, second, 0x88),
                                            _mm512_shuffle_i64x2(first, second, 0xDD));
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return _mm512_permutexvar_epi32(order, joined);
  }
};

// Low halves of the bytes are the first columns of four groups, high halves the others.
template <>
struct Piece<DType::u4> {
  static constexpr int kTooMuchBits = 0;
  static constexpr int kGroups = 4;
  __m512i low, high;

  void load(const uint8_t* p, __mmask64 mask) { set(_mm512_maskz_loadu_epi8(mask, p)); }
  void load(const uint8_t* p) { set(_mm512_loadu_si512(p)); }
  void set(__m512i both) {
    const __m512i nibble = _mm512_set1_epi8(15);
    low = _mm512_and_si512(both, nibble);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
  }
  __m512i dot(__m512i first, __m512i second) const {
    return add_fours(add_fours(_mm512_setzero_si512(), low, first), high, second);
  }
  // x: the first columns of the piece's groups, then the others.
  __m512i dot(const int8_t* x) const {
    return dot(_mm512_loadu_si512(x), _mm512_loadu_si512(x + 64));
  }
  __m512i dot_rest(const int8_t* x, int64_t groups) const {
    const __mmask64 mask = bytes_of_groups(groups, kGroup / 2);
    return dot(_mm512_maskz_loadu_epi8(mask, x),
               _mm512_maskz_loadu_epi8(mask, x + groups * kGroup / 2));
  }

  // Half a group's sum is at most 16 * 15 * 127 < 2^15. A quarter holds one group of each piece.
  static __m512i group_sums(const __m512i* sums) {
    const __m512i joined = add_small_neighbours(add_small_neighbours(sums[0], sums[1]),
                                                add_small_neighbours(sums[2], sums[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, joined);
  }
};

constexpr int kQuad = 4;  // groups

// Dot products of four rows with kTokens vectors. Group g of a row is added to lane g % 16 of the
// row's register. Groups beyond the last sixteen are taken four at a time, those of all rows
// together; row r's are added to quarter r of a register that the rows share. Groups ascend in both.
//
// Rows are read side by side or, with kOneByOne, one after the other. There `ahead` is a place in
// the stream of records, and what a group takes of it has its scales in it.
template <DType kType, int kTokens, bool kOneByOne>
struct GroupDot {
  using P = Piece<kType>;
  static constexpr int kRows = 4, kPerQuad = kQuad / P::kGroups;
  static constexpr int64_t kPieceBytes = 64, kGroupBytes = kPieceBytes / P::kGroups;

  struct Row {
    const uint8_t *q, *ahead;
    const Half* scale;
  };

  static constexpr int kHalves = kType == DType::u4 ? 2 : 1;
  static constexpr int64_t kAheadBytes = kGroupBytes + (kOneByOne ? kHalves * sizeof(Half) : 0);

  const Vectors& x;
  const int64_t num_groups, row_bytes, groups_apart;

  GroupDot(const Vectors& vectors, int64_t groups)
      : x(vectors),
        num_groups(groups),
        row_bytes(groups * kGroupBytes),
        groups_apart(vectors.ld / kGroup) {}

  // out[k][r] of all rows; some may be the same.
  INLINE void run(const Row* rows, float (*out)[kRows]) const {
    Vec::Reg sum[kRows][kTokens];
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      UNROLL
      for (int k = 0; k < kTokens; ++k) sum[r][k] = Vec::set1(0.0f);
    }
    const int64_t g = num_groups / 16 * 16;
    if (kOneByOne) {
      UNROLL
      for (int r = 0; r < kRows; ++r) add_row(rows[r], g, sum[r]);
    } else {
      for (int64_t first = 0; first < g; first += 16) {
        UNROLL
        for (int r = 0; r < kRows; ++r) add_sixteen(rows[r], first, sum[r]);
      }
    }
    UNROLL
    for (int k = 0; k < kTokens; ++k) {
      const Vec::Reg of_rows[kRows] = {sum[0][k], sum[1][k], sum[2][k], sum[3][k]};
      Vec::sum4(of_rows, out[k]);
    }
    if (g == num_groups) return;

    Vec::Reg rest[kTokens];
    UNROLL
    for (int k = 0; k < kTokens; ++k) rest[k] = Vec::set1(0.0f);
    for (int64_t first = g; first < num_groups; first += kQuad) add_quads(rows, first, rest);
    UNROLL
    for (int k = 0; k < kTokens; ++k) {
      _mm_storeu_ps(out[k], _mm_add_ps(_mm_loadu_ps(out[k]), Vec::sum_quarters(rest[k])));
    }
  }

 private:
  INLINE void add_row(const Row& row, int64_t end, Vec::Reg* sum) const {
    Vec::Reg of_row[kTokens];  // a sum in memory would be loaded and stored each time
    UNROLL
    for (int k = 0; k < kTokens; ++k) of_row[k] = Vec::set1(0.0f);
    for (int64_t g = 0; g < end; g += 16) add_sixteen(row, g, of_row);
    UNROLL
    for (int k = 0; k < kTokens; ++k) sum[k] = of_row[k];
  }

  INLINE void add_sixteen(const Row& row, int64_t g, Vec::Reg* sum) const {
    constexpr int kPieces = 16 / P::kGroups;
    ask_for_lines<16 * kAheadBytes / kLineBytes>(row.ahead + g * kAheadBytes);
    P piece[kPieces];
    UNROLL
    for (int i = 0; i < kPieces; ++i) {
      piece[i].load(row.q + g * kGroupBytes + i * kPieceBytes);
    }
    const Vec::Reg scales = Vec::load(row.scale + g);
    Vec::Reg least;
    if (kType == DType::u4) least = Vec::load(row.scale + num_groups + g);
    const int8_t* bytes = x_bytes(g);
    UNROLL
    for (int k = 0; k < kTokens; ++k) {
      __m512i sums[kPieces];
      UNROLL
      for (int i = 0; i < kPieces; ++i) {
        sums[i] = piece[i].dot(bytes + k * x.ld + i * P::kGroups * kGroup);
      }
      const int64_t at = k * groups_apart + g;
      const __m512i whole = P::group_sums(sums);
      sum[k] = add_scaled(sum[k], whole, _mm512_loadu_si512(x.total + at), scales,
                          Vec::load(x.scale + at));
      if (kType == DType::u4) sum[k] = Vec::fma(least, Vec::load(x.sum + at), sum[k]);
    }
  }

  INLINE void add_quads(const Row* rows, int64_t g, Vec::Reg* sum) const {
    const int64_t count = num_groups - g < kQuad ? num_groups - g : kQuad;
    P piece[kRows * kPerQuad];
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      UNROLL
      for (int j = 0; j < kPerQuad; ++j) {
        const int64_t first = g + j * P::kGroups;
        if (j == 0 || first < num_groups) ask_for(rows[r].ahead + first * kAheadBytes);
        piece[r * kPerQuad + j].load(rows[r].q + first * kGroupBytes,
                                     bytes_of_groups(num_groups - first, kGroupBytes));
      }
    }
    const Vec::Reg scales = load_quads(rows, g, count);
    Vec::Reg least;
    if (kType == DType::u4) least = load_quads(rows, num_groups + g, count);
    const int8_t* bytes = x_bytes(g);
    UNROLL
    for (int k = 0; k < kTokens; ++k) {
      __m512i sums[kRows * kPerQuad];
      UNROLL
      for (int i = 0; i < kRows * kPerQuad; ++i) {
        const int64_t done = i % kPerQuad * P::kGroups;
        sums[i] = piece[i].dot_rest(bytes + k * x.ld + done * kGroup, count - done);
      }
      const int64_t at = k * groups_apart + g;
      const __mmask8 lanes = static_cast<__mmask8>((1 << count) - 1);
      const __m512i whole = P::group_sums(sums);
      const __m512i total =
          _mm512_broadcast_i32x4(_mm_maskz_loadu_epi32(lanes, x.total + at));
      sum[k] = add_scaled(sum[k], whole, total, scales, load_quad(x.scale + at, lanes));
      if (kType == DType::u4) sum[k] = Vec::fma(least, load_quad(x.sum + at, lanes), sum[k]);
    }
  }

  const int8_t* x_bytes(int64_t g) const {
    return (kType == DType::q8 ? x.q : x.q_halves) + g * kGroup;
  }
  static Vec::Reg add_scaled(Vec::Reg sum, __m512i whole, __m512i total, Vec::Reg scales,
                             Vec::Reg x_scales) {
    if (P::kTooMuchBits > 0) {
      whole = _mm512_sub_epi32(whole, _mm512_slli_epi32(total, P::kTooMuchBits));
    }
    return Vec::fma(_mm512_cvtepi32_ps(whole), Vec::mul(scales, x_scales), sum);
  }
  // The same four in all quarters.
  static Vec::Reg load_quad(const float* p, __mmask8 lanes) {
    return _mm512_broadcast_f32x4(_mm_maskz_loadu_ps(lanes, p));
  }
  // Four of each row.
  static Vec::Reg load_quads(const Row* rows, int64_t at, int64_t count) {
    const __mmask8 lanes = static_cast<__mmask8>((1 << count) - 1);
    __m128i quad[kRows];
    UNROLL
    for (int r = 0; r < kRows; ++r) quad[r] = _mm_maskz_loadu_epi16(lanes, rows[r].scale + at);
    return _mm512_cvtph_ps(_mm256_set_m128i(_mm_unpacklo_epi64(quad[2], quad[3]),
                                            _mm_unpacklo_epi64(quad[0], quad[1])));
  }
};

// The whole numbers of a strip's group, times those of a vector.
struct StripGroup {
  __m512i low[4], high[4];

  explicit StripGroup(const uint8_t* p) {
    const __m512i nibble = _mm512_set1_epi8(15);
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512i both = _mm512_loadu_si512(p + 64 * j);
      low[j] = _mm512_and_si512(both, nibble);
      high[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
  }

  // A lane per row; `total` is the sum of q, of which the stored numbers have 8 too many. Sums of 16
  // products fit 16 bits: 16 * 15 * 127 < 2^15.
  INLINE void dot(const int8_t* q, int32_t total, Vec::Reg* whole) const {
    const __m512i too_much = _mm512_set1_epi32(8 * total);
#ifdef HOTNEURON_VNNI
    __m512i first = _mm512_setzero_si512(), second = _mm512_setzero_si512();
    UNROLL
    for (int j = 0; j < 4; ++j) {
      first = _mm512_dpbusd_epi32(first, low[j], four(q + 4 * j));
      second = _mm512_dpbusd_epi32(second, high[j], four(q + 16 + 4 * j));
    }
    const __m512i sums = _mm512_add_epi32(first, second);
#else
    __m512i twos = _mm512_setzero_si512();
    UNROLL
    for (int j = 0; j < 4; ++j) {
      twos = _mm512_add_epi16(twos, _mm512_maddubs_epi16(low[j], four(q + 4 * j)));
      twos = _mm512_add_epi16(twos, _mm512_maddubs_epi16(high[j], four(q + 16 + 4 * j)));
    }
    const __m512i sums = _mm512_madd_epi16(twos, _mm512_set1_epi16(1));
#endif
    *whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, too_much));
  }

 private:
  static __m512i four(const int8_t* q) {
    int32_t bytes;
    __builtin_memcpy(&bytes, q, sizeof(bytes));
    return _mm512_set1_epi32(bytes);
  }
};

}  // namespace

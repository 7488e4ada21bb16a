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

// 64 bytes of a row; `kGroups` groups, whose sums are spread over `16 / kGroups` lanes each.
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
  __m512i dot(const int8_t* x, int64_t, __mmask64 mask) const {
    return dot(_mm512_maskz_loadu_epi8(mask, x));
  }

  // A lane per group. A quarter of a register holds half the lanes of one group of each piece.
  template <int kPieces>
  static __m512i group_sums(const __m512i* sums) {
    constexpr int kLast = kPieces - 1;
    const auto piece = [&](int i) { return sums[i < kLast ? i : kLast]; };
    const __m512i first = add_neighbours(add_neighbours(piece(0), piece(1)),
                                         add_neighbours(piece(2), piece(3)));
    __m512i second = first;
    if (kPieces > 4) {
      second = add_neighbours(add_neighbours(piece(4), piece(5)),
                              add_neighbours(piece(6), piece(7)));
    }
    const __m512i joined = _mm512_add_epi32(_mm512_shuffle_i64x2(first, second, 0x88),
                                            _mm512_shuffle_i64x2(first, second, 0xDD));
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return _mm512_permutexvar_epi32(order, joined);
  }
};

// Low halves of the bytes are the first columns of four groups, high halves the others.
struct NibblePiece {
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
  // x: the first columns of `count` groups, then the others.
  __m512i dot(const int8_t* x) const {
    return dot(_mm512_loadu_si512(x), _mm512_loadu_si512(x + 64));
  }
  __m512i dot(const int8_t* x, int64_t count, __mmask64 mask) const {
    return dot(_mm512_maskz_loadu_epi8(mask, x),
               _mm512_maskz_loadu_epi8(mask, x + count * kGroup / 2));
  }

  // Half a group's sum is at most 16 * 15 * 127 < 2^15. A quarter holds one group of each piece.
  template <int kPieces>
  static __m512i group_sums(const __m512i* sums) {
    constexpr int kLast = kPieces - 1;
    const auto piece = [&](int i) { return sums[i < kLast ? i : kLast]; };
    const __m512i joined = add_small_neighbours(add_small_neighbours(piece(0), piece(1)),
                                                add_small_neighbours(piece(2), piece(3)));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, joined);
  }
};
template <>
struct Piece<DType::q4> : NibblePiece {
  static constexpr int kTooMuchBits = 3;  // stored plus 8
};
template <>
struct Piece<DType::u4> : NibblePiece {
  static constexpr int kTooMuchBits = 0;
};

// Dot products of rows with kTokens vectors, as registers whose lanes are to be added up: group g
// of a row in lane g % 16, groups ascending.
template <DType kType, int kTokens>
struct RowDot {
  using P = Piece<kType>;
  static constexpr int64_t kPieceBytes = 64, kGroupBytes = kPieceBytes / P::kGroups;
  const Vectors& x;
  const int64_t num_groups, groups_apart;
  const int64_t rest;  // groups beyond whole pieces
  const __mmask64 rest_bytes;

  RowDot(const Vectors& vectors, int64_t groups)
      : x(vectors),
        num_groups(groups),
        groups_apart(vectors.ld / kGroup),
        rest(groups % P::kGroups),
        rest_bytes((__mmask64{1} << rest * kGroupBytes) - 1) {}

  // sum: per token, `apart` registers from one to the next.
  void run(const uint8_t* q, const Half* scale, const uint8_t* ahead, Vec::Reg* sum,
           int64_t apart) const {
    Vec::Reg s[kTokens];
    UNROLL
    for (int k = 0; k < kTokens; ++k) s[k] = Vec::set1(0.0f);
    int64_t g = 0;
    for (; g + 16 <= num_groups; g += 16) add<16>(q, scale, ahead, g, s);
    if (num_groups & 8) add<8>(q, scale, ahead, g, s), g += 8;
    if (num_groups & 4) add<4>(q, scale, ahead, g, s), g += 4;
    if (P::kGroups == 2 && num_groups & 2) add<2>(q, scale, ahead, g, s), g += 2;
    if (rest) add<0>(q, scale, ahead, g, s);
    UNROLL
    for (int k = 0; k < kTokens; ++k) sum[k * apart] = s[k];
  }

 private:
  // kCount groups from g on; 0: the rest.
  template <int kCount>
  inline __attribute__((always_inline)) void add(const uint8_t* q, const Half* scale,
                                                 const uint8_t* ahead, int64_t g,
                                                 Vec::Reg* s) const {
    constexpr int kPieces = kCount ? kCount / P::kGroups : 1;
    P piece[kPieces];
    UNROLL
    for (int i = 0; i < kPieces; ++i) {
      ask_for(ahead + g * kGroupBytes + i * kPieceBytes);
      const uint8_t* bytes = q + g * kGroupBytes + i * kPieceBytes;
      kCount ? piece[i].load(bytes) : piece[i].load(bytes, rest_bytes);
    }
    const Vec::Reg scales = load<kCount>(scale + g);
    Vec::Reg least;
    if (kType == DType::u4) least = load<kCount>(scale + num_groups + g);
    const int8_t* bytes = (P::kGroups == 2 ? x.q : x.q_halves) + g * kGroup;
    UNROLL
    for (int k = 0; k < kTokens; ++k) {
      const int8_t* x_bytes = bytes + k * x.ld;
      __m512i sums[kPieces];
      UNROLL
      for (int i = 0; i < kPieces; ++i) {
        sums[i] = kCount ? piece[i].dot(x_bytes + i * P::kGroups * kGroup)
                         : piece[i].dot(x_bytes, rest, rest_bytes);
      }
      const int64_t at = k * groups_apart + g;
      __m512i whole = P::template group_sums<kPieces>(sums);
      if (P::kTooMuchBits > 0) {
        const __m512i total = _mm512_maskz_loadu_epi32(lanes<kCount>(), x.total + at);
        whole = _mm512_sub_epi32(whole, _mm512_slli_epi32(total, P::kTooMuchBits));
      }
      const Vec::Reg times = Vec::mul(scales, load<kCount>(x.scale + at));
      s[k] = Vec::fma(_mm512_cvtepi32_ps(whole), times, s[k]);
      if (kType == DType::u4) s[k] = Vec::fma(least, load<kCount>(x.sum + at), s[k]);
    }
  }

  template <int kCount>
  __mmask16 lanes() const {
    return Vec::first(kCount ? kCount : rest);
  }
  template <int kCount, class T>
  Vec::Reg load(const T* p) const {
    return kCount == 16 ? Vec::load(p) : Vec::load(p, kCount ? kCount : rest);
  }
};

}  // namespace

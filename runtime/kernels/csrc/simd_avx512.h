// Sixteen lanes with AVX-512 F, BW, DQ and VL (masked loads of 8- and 16-bit elements); with VNNI
// where HOTNEURON_VNNI is defined.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "simd_groups.h"

namespace {

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr int kTokenTile = 4;
  using Reg = __m512;

  static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static Reg widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
  static Reg widen(__m128i i8) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(i8)); }

  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static Reg load(const Bf16* p) { return widen(_mm256_loadu_epi16(p)); }
  static Reg load(const Bf16* p, int64_t count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static Reg load(const int8_t* p) { return widen(_mm_loadu_epi8(p)); }
  static Reg load(const int8_t* p, int64_t count) {
    return widen(_mm_maskz_loadu_epi8(first(count), p));
  }
  // The low halves of kWidth bytes and the high ones. The permutation looks at the lowest four bits
  // of an index only.
  static void load_nibbles(const uint8_t* p, Reg* low, Reg* high) {
    const __m512i both =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    *low = _mm512_permutexvar_ps(both, values);
    *high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
  }
  static Reg load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_epi16(p)); }
  static Reg load(const Half* p, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, Reg v, int64_t count) { _mm512_mask_storeu_ps(p, first(count), v); }

  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg round(Reg a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^a for whole a.
  static Reg pow2(Reg a) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), a); }

  static __m128 quarters(Reg v) {
    const __m512 half = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4E));
    const __m512 quarter = _mm512_add_ps(half, _mm512_shuffle_f32x4(half, half, 0xB1));
    return _mm512_castps512_ps128(quarter);
  }
  static void sum4(const Reg* v, float* out) {
    __m128 a = quarters(v[0]), b = quarters(v[1]), c = quarters(v[2]), d = quarters(v[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
  }
};

// Two groups at a time: the weights, the vector and their products in whole sums of four.
template <DType kType>
struct PairWeight;
template <DType kType>
struct PairInput;

inline __m512i fours_of(__m512i unsigned_bytes, __m512i signed_bytes) {
  const __m512i twos = _mm512_maddubs_epi16(unsigned_bytes, signed_bytes);
  return _mm512_madd_epi16(twos, _mm512_set1_epi16(1));
}

// Both groups' bytes twice, of which the second gives the high halves.
inline __m512i pair_nibbles(const uint8_t* p) {
  const __m512i both = _mm512_castsi256_si512(group_bytes(p));
  const __m512i twice = _mm512_shuffle_i64x2(both, both, 0x50);
  const __m512i spread = _mm512_mask_srli_epi16(twice, 0xFF00FF00, twice, 4);
  return _mm512_and_si512(spread, _mm512_set1_epi8(15));
}

#ifdef HOTNEURON_VNNI

// Sums of four in one instruction without a 16-bit step: 8-bit weights are taken plus 128.
template <>
struct PairWeight<DType::q8> {
  __m512i q;
  void load(const uint8_t* p) {
    q = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }
};
template <>
struct PairWeight<DType::q4> {
  __m512i q;
  void load(const uint8_t* p) { q = pair_nibbles(p); }
};
template <DType kType>
struct PairInput {
  __m512i q, start;  // the sum starts at what it will have too much
  explicit PairInput(const int8_t* p) : q(_mm512_loadu_si512(p)) {
    start = _mm512_setzero_si512();
    if (kType == DType::u4) return;
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(kType == DType::q8 ? 128 : 8));
    start = _mm512_sub_epi32(start, _mm512_dpbusd_epi32(start, offset, q));
  }
};
template <DType kType>
inline __m512i fours_of(const PairWeight<kType>& w, const PairInput<kType>& x) {
  return _mm512_dpbusd_epi32(x.start, w.q, x.q);
}

#else

template <>
struct PairWeight<DType::q8> {
  __m512i size;
  __mmask64 is_negative;
  void load(const uint8_t* p) {
    const __m512i q = _mm512_loadu_si512(p);
    size = _mm512_abs_epi8(q);
    is_negative = _mm512_movepi8_mask(q);
  }
};
template <>
struct PairInput<DType::q8> {
  __m512i q;
  explicit PairInput(const int8_t* p) : q(_mm512_loadu_si512(p)) {}
};
inline __m512i fours_of(const PairWeight<DType::q8>& w, const PairInput<DType::q8>& x) {
  const __m512i zero = _mm512_setzero_si512();
  return fours_of(w.size, _mm512_mask_sub_epi8(x.q, w.is_negative, zero, x.q));
}

template <>
struct PairWeight<DType::q4> {
  __m512i q;
  void load(const uint8_t* p) { q = pair_nibbles(p); }
};
template <>
struct PairInput<DType::q4> {
  __m512i q, too_much;
  explicit PairInput(const int8_t* p)
      : q(_mm512_loadu_si512(p)), too_much(fours_of(_mm512_set1_epi8(8), q)) {}
};
inline __m512i fours_of(const PairWeight<DType::q4>& w, const PairInput<DType::q4>& x) {
  return _mm512_sub_epi32(fours_of(w.q, x.q), x.too_much);
}

template <>
struct PairInput<DType::u4> {
  __m512i q;
  explicit PairInput(const int8_t* p) : q(_mm512_loadu_si512(p)) {}
};
inline __m512i fours_of(const PairWeight<DType::q4>& w, const PairInput<DType::u4>& x) {
  return fours_of(w.q, x.q);
}

#endif

template <>
struct PairWeight<DType::u4> : PairWeight<DType::q4> {};

// Sums of scaled groups.
struct GroupDot {
  static constexpr int kGroups = 2;  // at a time
  template <DType kType>
  using Weight = PairWeight<kType>;
  template <DType kType>
  using Input = PairInput<kType>;

  template <DType kType>
  static Vec::Reg add(Vec::Reg sum, const PairWeight<kType>& weight, const PairInput<kType>& x,
                      const float* scale) {
    const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    double pair;  // one load that a store just before can be forwarded to
    __builtin_memcpy(&pair, scale, sizeof(pair));
    const __m512 scales = _mm512_castpd_ps(_mm512_set1_pd(pair));
    return Vec::fma(_mm512_cvtepi32_ps(fours_of(weight, x)), _mm512_permutexvar_ps(half, scales),
                    sum);
  }
  template <DType kType>
  static Vec::Reg add_one(Vec::Reg sum, const uint8_t* weight, const int8_t* x, float scale) {
    GroupWeight<kType> w;
    w.load(weight);
    const __m256 fours = _mm256_cvtepi32_ps(fours_of(w, GroupInput<kType>(x)));
    return Vec::fma(_mm512_zextps256_ps512(fours), Vec::set1(scale), sum);
  }
};

}  // namespace

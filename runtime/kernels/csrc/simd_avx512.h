// Sixteen lanes with AVX-512 F, BW and VL (masked loads of 8- and 16-bit elements).
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

// Sums of scaled groups.
struct GroupDot {
  static constexpr int kGroups = 2;  // at a time

  template <int kBits>
  static Vec::Reg add(Vec::Reg sum, const uint8_t* weight, const int8_t* x, const float* scale) {
    const __m512i fours = whole_sums<kBits>(weight, _mm512_loadu_si512(x));
    const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    double pair;  // one load that a store just before can be forwarded to
    __builtin_memcpy(&pair, scale, sizeof(pair));
    const __m512 scales = _mm512_castpd_ps(_mm512_set1_pd(pair));
    return Vec::fma(_mm512_cvtepi32_ps(fours), _mm512_permutexvar_ps(half, scales), sum);
  }
  template <int kBits>
  static Vec::Reg add_one(Vec::Reg sum, const uint8_t* weight, const int8_t* x, float scale) {
    return Vec::fma(_mm512_zextps256_ps512(group_dot<kBits>(weight, x)), Vec::set1(scale), sum);
  }

 private:
  // As group_dot, of both groups.
  template <int kBits>
  static __m512i whole_sums(const uint8_t* weight, __m512i x) {
    if (kBits == 4) {
      return _mm512_sub_epi32(fours_of(nibbles(weight), x), fours_of(_mm512_set1_epi8(8), x));
    }
    const __m512i w = _mm512_loadu_si512(weight);
    const __m512i zero = _mm512_setzero_si512();
    return fours_of(_mm512_abs_epi8(w), _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), zero, x));
  }
  static __m512i fours_of(__m512i unsigned_bytes, __m512i signed_bytes) {
    const __m512i twos = _mm512_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm512_madd_epi16(twos, _mm512_set1_epi16(1));
  }
  // Both groups' bytes twice, of which the second gives the high halves.
  static __m512i nibbles(const uint8_t* p) {
    const __m512i both = _mm512_castsi256_si512(group_bytes(p));
    const __m512i twice = _mm512_shuffle_i64x2(both, both, 0x50);
    const __m512i spread = _mm512_mask_srli_epi16(twice, 0xFF00FF00, twice, 4);
    return _mm512_and_si512(spread, _mm512_set1_epi8(15));
  }
};

}  // namespace

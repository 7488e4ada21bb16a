// Sixteen lanes with AVX-512 F, BW, DQ and VL (masked loads of 8- and 16-bit elements); with VNNI
// where HOTNEURON_VNNI is defined.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "elements.h"
#include "kernels.h"
#include "unroll.h"

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
  static bool all_finite(Reg a) {
    constexpr int kNotFinite = 0x99;  // quiet and other NaNs, both infinities
    return _mm512_fpclass_ps_mask(a, kNotFinite) == 0;
  }
  static float max_lanes(Reg a) { return _mm512_reduce_max_ps(a); }
  // Whole numbers that fit a byte.
  static void store_whole(int8_t* p, Reg whole) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  // 2^a for whole a.
  static Reg pow2(Reg a) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), a); }

  static __m128 quarters(Reg v) {
    const __m512 half = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4E));
    const __m512 quarter = _mm512_add_ps(half, _mm512_shuffle_f32x4(half, half, 0xB1));
    return _mm512_castps512_ps128(quarter);
  }
  // The sum of each quarter's lanes.
  static __m128 sum_quarters(Reg v) {
    const __m512 pairs = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0xB1));
    const __m512 sums = _mm512_add_ps(pairs, _mm512_shuffle_ps(pairs, pairs, 0x4E));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sums));
  }
  static INLINE void sum4(const Reg* v, float* out) {
    __m128 a = quarters(v[0]), b = quarters(v[1]), c = quarters(v[2]), d = quarters(v[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
  }
};

}  // namespace

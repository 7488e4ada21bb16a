// Eight lanes with AVX2 and FMA.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "simd_groups.h"

namespace {

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kTokenTile = 2;
  using Reg = __m256;

  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Reg load(const int8_t* p) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bits));
  }
  // The low halves of kWidth bytes and the high ones.
  static void load_nibbles(const uint8_t* p, Reg* low, Reg* high) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m256i both = _mm256_cvtepu8_epi32(bytes);
    *low = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
    *high = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
  }
  // Finite: exponents differ by 112.
  static Reg load(const Half* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i bits = _mm256_cvtepu16_epi32(halves);
    const __m256i size = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7FFF)), 13);
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(bits, 15), 31);
    return mul(_mm256_castsi256_ps(_mm256_or_si256(size, sign)), set1(0x1p112f));
  }
  template <class T>
  static Reg load(const T* p, int64_t count) {
    T padded[kWidth] = {};
    memcpy(padded, p, count * sizeof(T));
    return load(padded);
  }
  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static void store(float* p, Reg v, int64_t count) {
    float lanes[kWidth];
    store(lanes, v);
    memcpy(p, lanes, count * sizeof(float));
  }

  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg round(Reg a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^a for whole a in [-126, 127].
  static Reg pow2(Reg a) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static __m128 halves(Reg v) {
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  }
  static void sum4(const Reg* v, float* out) {
    __m128 a = halves(v[0]), b = halves(v[1]), c = halves(v[2]), d = halves(v[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
  }
};

// Sums of scaled groups.
struct GroupDot {
  static constexpr int kGroups = 1;  // at a time
  template <DType kType>
  using Weight = GroupWeight<kType>;
  template <DType kType>
  using Input = GroupInput<kType>;

  template <DType kType>
  static Vec::Reg add(Vec::Reg sum, const GroupWeight<kType>& weight, const GroupInput<kType>& x,
                      const float* scale) {
    return Vec::fma(_mm256_cvtepi32_ps(fours_of(weight, x)), Vec::set1(*scale), sum);
  }
};

}  // namespace

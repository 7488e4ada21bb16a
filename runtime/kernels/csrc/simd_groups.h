// What AVX2 and AVX-512 share: a group of 32 whole numbers is one register of 32 bytes.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

inline __m128 halves(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
inline void sum4_of_8(const __m256* v, float* out) {
  __m128 a = halves(v[0]), b = halves(v[1]), c = halves(v[2]), d = halves(v[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
}

struct GroupDot {
  using Sums = __m256;

  static Sums zero() { return _mm256_setzero_ps(); }
  // Adds scale * (whole sums of four products each) to eight lanes.
  template <int kBits>
  static Sums add(Sums sums, const uint8_t* weight, const int8_t* x, float scale) {
    const __m256i w = kBits == 8 ? bytes(weight) : nibbles(weight);
    const __m256i input = bytes(x);
    // The instruction wants one side unsigned, so the weight's sign goes to the input. A sum of two
    // products is at most 2 * 128 * 127: it fits 16 bits.
    const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(input, w));
    const __m256i fours = _mm256_madd_epi16(twos, _mm256_set1_epi16(1));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), _mm256_set1_ps(scale), sums);
  }
  static void sum4(const Sums* v, float* out) { sum4_of_8(v, out); }

 private:
  static __m256i bytes(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static __m256i nibbles(const uint8_t* p) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i spread = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
    return _mm256_sub_epi8(_mm256_and_si256(spread, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
  }
};

}  // namespace

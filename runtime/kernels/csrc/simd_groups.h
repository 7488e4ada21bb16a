// What AVX2 and AVX-512 share: a group of 32 whole numbers is one register of 32 bytes.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

inline __m256i group_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline __m256i group_nibbles(const uint8_t* p) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i spread = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
  return _mm256_sub_epi8(_mm256_and_si256(spread, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}

// A group's products in whole sums of four. The instruction wants one side unsigned, so the
// weight's sign goes to x. A sum of two products is at most 2 * 128 * 127: it fits 16 bits.
template <int kBits>
inline __m256 group_dot(const uint8_t* weight, const int8_t* x) {
  const __m256i w = kBits == 8 ? group_bytes(weight) : group_nibbles(weight);
  const __m256i signed_x = _mm256_sign_epi8(group_bytes(x), w);
  const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x);
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
}

}  // namespace

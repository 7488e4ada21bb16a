// What AVX2 and AVX-512 share: a group of 32 whole numbers is one register of 32 bytes.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

inline __m256i group_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
// As they are stored: plus 8.
inline __m256i group_nibbles(const uint8_t* p) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i spread = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
  return _mm256_and_si256(spread, _mm256_set1_epi8(15));
}

inline __m256i fours_of(__m256i unsigned_bytes, __m256i signed_bytes) {
  const __m256i twos = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
  return _mm256_madd_epi16(twos, _mm256_set1_epi16(1));
}

// A group's products in whole sums of four. The instruction wants one side unsigned: the sign of an
// 8-bit weight goes to x, and the 8 that 4-bit weights have too much is taken off afterwards, by a
// sum that all rows of a tile share. Two products are at most 2 * 128 * 127: they fit 16 bits.
template <int kBits>
inline __m256 group_dot(const uint8_t* weight, const int8_t* x) {
  const __m256i whole_x = group_bytes(x);
  if (kBits == 4) {
    const __m256i too_much = fours_of(_mm256_set1_epi8(8), whole_x);
    return _mm256_cvtepi32_ps(
        _mm256_sub_epi32(fours_of(group_nibbles(weight), whole_x), too_much));
  }
  const __m256i w = group_bytes(weight);
  return _mm256_cvtepi32_ps(fours_of(_mm256_abs_epi8(w), _mm256_sign_epi8(whole_x, w)));
}

}  // namespace

// What AVX2 and AVX-512 share: a group of 32 whole numbers is one register of 32 bytes.
//
// The instructions for products of bytes want one side unsigned. The sign of an 8-bit weight goes
// to x: two products are at most 2 * 128 * 127, which fits the 16 bits of their sum. Those of q4 are
// stored plus 8; what that is too much is taken off by a sum that all rows of a tile share.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "elements.h"
#include "kernels.h"

namespace {

using hotneuron::DType;

inline __m256i group_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
// As they are stored.
inline __m256i group_nibbles(const uint8_t* p) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i spread = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
  return _mm256_and_si256(spread, _mm256_set1_epi8(15));
}

inline __m256i fours_of(__m256i unsigned_bytes, __m256i signed_bytes) {
  const __m256i twos = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
  return _mm256_madd_epi16(twos, _mm256_set1_epi16(1));
}

// One group of a row's weights, of a vector, and their products in whole sums of four.
template <DType kType>
struct GroupWeight;
template <DType kType>
struct GroupInput;

template <>
struct GroupWeight<DType::q8> {
  __m256i q, size;
  void load(const uint8_t* p) {
    q = group_bytes(p);
    size = _mm256_abs_epi8(q);
  }
};
template <>
struct GroupInput<DType::q8> {
  __m256i q;
  explicit GroupInput(const int8_t* p) : q(group_bytes(p)) {}
};
inline __m256i fours_of(const GroupWeight<DType::q8>& w, const GroupInput<DType::q8>& x) {
  return fours_of(w.size, _mm256_sign_epi8(x.q, w.q));
}

template <>
struct GroupWeight<DType::q4> {
  __m256i q;
  void load(const uint8_t* p) { q = group_nibbles(p); }
};
template <>
struct GroupInput<DType::q4> {
  __m256i q, too_much;
  explicit GroupInput(const int8_t* p)
      : q(group_bytes(p)), too_much(fours_of(_mm256_set1_epi8(8), q)) {}
};
inline __m256i fours_of(const GroupWeight<DType::q4>& w, const GroupInput<DType::q4>& x) {
  return _mm256_sub_epi32(fours_of(w.q, x.q), x.too_much);
}

template <>
struct GroupWeight<DType::u4> : GroupWeight<DType::q4> {};
template <>
struct GroupInput<DType::u4> {
  __m256i q;
  explicit GroupInput(const int8_t* p) : q(group_bytes(p)) {}
};
inline __m256i fours_of(const GroupWeight<DType::u4>& w, const GroupInput<DType::u4>& x) {
  return fours_of(w.q, x.q);
}

}  // namespace

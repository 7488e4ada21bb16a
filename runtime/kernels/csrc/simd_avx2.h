// Eight lanes with AVX2 and FMA.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "elements.h"
#include "kernels.h"

namespace {

using hotneuron::DType;

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
  static bool all_finite(Reg a) {
    const Reg zero = _mm256_setzero_ps();
    return _mm256_movemask_ps(_mm256_cmp_ps(mul(a, zero), zero, _CMP_EQ_OQ)) == 0xFF;
  }
  static float max_lanes(Reg a) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }
  // Whole numbers that fit a byte.
  static void store_whole(int8_t* p, Reg whole) {
    const __m256i ints = _mm256_cvtps_epi32(whole);
    const __m128i shorts =
        _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(shorts, shorts));
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

// The instruction for products of bytes wants one side unsigned. The sign of an 8-bit weight goes
// to x: two products are at most 2 * 128 * 127, which fits the 16 bits of their sum.
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
struct GroupWeight<DType::u4> {
  __m256i q;
  void load(const uint8_t* p) { q = group_nibbles(p); }
};
template <>
struct GroupInput<DType::u4> {
  __m256i q;
  explicit GroupInput(const int8_t* p) : q(group_bytes(p)) {}
};
inline __m256i fours_of(const GroupWeight<DType::u4>& w, const GroupInput<DType::u4>& x) {
  return fours_of(w.q, x.q);
}

// sum + scale times the products of one group.
template <DType kType>
inline Vec::Reg add_group(Vec::Reg sum, const GroupWeight<kType>& weight,
                          const GroupInput<kType>& x, float scale) {
  return Vec::fma(_mm256_cvtepi32_ps(fours_of(weight, x)), Vec::set1(scale), sum);
}

// The whole numbers of a strip's group, times those of a vector.
struct StripGroup {
  const uint8_t* lines;

  explicit StripGroup(const uint8_t* p) : lines(p) {}

  // A lane per row; `total` is the sum of q, of which the stored numbers have 8 too many. Sums of 16
  // products fit 16 bits: 16 * 15 * 127 < 2^15.
  void dot(const int8_t* q, int32_t total, Vec::Reg* whole) const {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int half = 0; half < 2; ++half) {
      __m256i twos = _mm256_setzero_si256();
      for (int j = 0; j < 4; ++j) {
        const __m256i both =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + 64 * j + 32 * half));
        const __m256i low = _mm256_and_si256(both, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        twos = _mm256_add_epi16(twos, _mm256_maddubs_epi16(low, four(q + 4 * j)));
        twos = _mm256_add_epi16(twos, _mm256_maddubs_epi16(high, four(q + 16 + 4 * j)));
      }
      const __m256i sums = _mm256_madd_epi16(twos, _mm256_set1_epi16(1));
      whole[half] = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(8 * total)));
    }
  }

 private:
  static __m256i four(const int8_t* q) {
    int32_t bytes;
    memcpy(&bytes, q, sizeof(bytes));
    return _mm256_set1_epi32(bytes);
  }
};

}  // namespace

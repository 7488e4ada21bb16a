// Four lanes by the compiler's vector types: SSE2, NEON or whatever the base instruction set has.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "elements.h"
#include "kernels.h"

namespace {

using hotneuron::DType;

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr int kTokenTile = 2;
  typedef float Reg __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint16_t Bits16 __attribute__((vector_size(8)));
  typedef int8_t Ints8 __attribute__((vector_size(4)));

  static Reg set1(float x) { return Reg{x, x, x, x}; }
  static Reg load(const float* p) {
    Reg v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static Reg load(const Bf16* p) {
    Bits16 bits;
    memcpy(&bits, p, sizeof(bits));
    return (Reg)(__builtin_convertvector(bits, Bits) << 16);
  }
  static Reg load(const int8_t* p) {
    Ints8 bytes;
    memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Reg);
  }
  // The low halves of kWidth bytes and the high ones.
  static void load_nibbles(const uint8_t* p, Reg* low, Reg* high) {
    for (int i = 0; i < kWidth; ++i) {
      (*low)[i] = static_cast<float>(p[i] & 15);
      (*high)[i] = static_cast<float>(p[i] >> 4);
    }
  }
  // Finite: exponents differ by 112.
  static Reg load(const Half* p) {
    Bits16 bits;
    memcpy(&bits, p, sizeof(bits));
    const Bits wide = __builtin_convertvector(bits, Bits);
    return (Reg)((wide & 0x7FFF) << 13 | wide >> 15 << 31) * 0x1p112f;
  }
  template <class T>
  static Reg load(const T* p, int64_t count) {
    T padded[kWidth] = {};
    memcpy(padded, p, count * sizeof(T));
    return load(padded);
  }
  static void store(float* p, Reg v) { memcpy(p, &v, sizeof(v)); }
  static void store(float* p, Reg v, int64_t count) { memcpy(p, &v, count * sizeof(float)); }

  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  // a * b + c, rounded twice: a true fma is a library call on machines without one.
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg a, Reg b) {
    for (int i = 0; i < kWidth; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
  }
  static Reg round(Reg a) {
    for (int i = 0; i < kWidth; ++i) a[i] = nearbyintf(a[i]);
    return a;
  }
  static bool all_finite(Reg a) {
    const Reg zeros = a * 0.0f;
    return zeros[0] + zeros[1] + zeros[2] + zeros[3] == 0.0f;
  }
  static float max_lanes(Reg a) {
    float largest = a[0];
    for (int i = 1; i < kWidth; ++i) largest = a[i] > largest ? a[i] : largest;
    return largest;
  }
  // Whole numbers that fit a byte.
  static void store_whole(int8_t* p, Reg whole) {
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<int8_t>(whole[i]);
  }
  // 2^a for whole a in [-126, 127].
  static Reg pow2(Reg a) { return (Reg)(__builtin_convertvector(a + 127.0f, Ints) << 23); }
  static void sum4(const Reg* v, float* out) {
    for (int r = 0; r < 4; ++r) out[r] = (v[r][0] + v[r][2]) + (v[r][1] + v[r][3]);
  }
};

template <DType kType>
struct GroupWeight {
  int8_t q[hotneuron::kGroup];
  void load(const uint8_t* p) {
    constexpr int kHalf = hotneuron::kGroup / 2;
    constexpr bool kIsByte = kType == DType::q8;
    for (int i = 0; i < kHalf; ++i) {
      q[i] = static_cast<int8_t>(kIsByte ? p[i] : p[i] & 15);
      q[i + kHalf] = static_cast<int8_t>(kIsByte ? p[i + kHalf] : p[i] >> 4);
    }
  }
};
template <DType kType>
struct GroupInput {
  const int8_t* q;
  explicit GroupInput(const int8_t* p) : q(p) {}
};

// sum + scale times the products of one group.
template <DType kType>
inline Vec::Reg add_group(Vec::Reg sum, const GroupWeight<kType>& weight,
                          const GroupInput<kType>& x, float scale) {
  int32_t dot = 0;
  for (int i = 0; i < hotneuron::kGroup; ++i) dot += weight.q[i] * x.q[i];
  sum[0] += scale * static_cast<float>(dot);
  return sum;
}

// The whole numbers of a strip's group, times those of a vector.
struct StripGroup {
  const uint8_t* lines;

  explicit StripGroup(const uint8_t* p) : lines(p) {}

  // A lane per row; `total` is the sum of q, of which the stored numbers have 8 too many.
  void dot(const int8_t* q, int32_t total, Vec::Reg* whole) const {
    for (int row = 0; row < hotneuron::kStripRows; ++row) {
      int32_t sum = -8 * total;
      for (int i = 0; i < 16; ++i) {
        const uint8_t both = lines[i / 4 * 64 + row * 4 + i % 4];
        sum += (both & 15) * q[i] + (both >> 4) * q[i + 16];
      }
      whole[row / Vec::kWidth][row % Vec::kWidth] = static_cast<float>(sum);
    }
  }
};

}  // namespace

// bfloat16: the upper half of a float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace hotneuron {

inline float from_bf16(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// To nearest, halves to even.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// As f32 or bf16.
inline void store_floats(const float* x, int64_t size, DType dtype, char* out) {
  if (dtype == DType::f32) {
    std::memcpy(out, x, size * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const uint16_t bits = to_bf16(x[i]);
    std::memcpy(out + i * sizeof(bits), &bits, sizeof(bits));
  }
}

}  // namespace hotneuron

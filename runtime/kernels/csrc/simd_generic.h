// Eight lanes in plain C++; the compiler maps them to whatever the machine has.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kTokenTile = 2;
  struct Reg {
    float lane[kWidth];
  };

  static Reg set1(float x) {
    Reg v;
    for (int i = 0; i < kWidth; ++i) v.lane[i] = x;
    return v;
  }
  static Reg load(const float* p) { return load(p, kWidth); }
  static Reg load(const float* p, int64_t count) {
    Reg v = set1(0.0f);
    memcpy(v.lane, p, count * sizeof(float));
    return v;
  }
  static Reg load(const Bf16* p) { return load(p, kWidth); }
  static Reg load(const Bf16* p, int64_t count) {
    uint16_t bits[kWidth] = {};
    memcpy(bits, p, count * sizeof(uint16_t));
    uint32_t wide[kWidth];
    for (int i = 0; i < kWidth; ++i) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
    Reg v;
    memcpy(v.lane, wide, sizeof(wide));
    return v;
  }
  static Reg load(const int8_t* p) { return load(p, kWidth); }
  static Reg load(const int8_t* p, int64_t count) {
    Reg v = set1(0.0f);
    for (int i = 0; i < count; ++i) v.lane[i] = p[i];
    return v;
  }
  static void store(float* p, Reg v) { store(p, v, kWidth); }
  static void store(float* p, Reg v, int64_t count) { memcpy(p, v.lane, count * sizeof(float)); }

  static Reg add(Reg a, Reg b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Reg mul(Reg a, Reg b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  // a * b + c, rounded twice: a true fma is a library call on machines without one.
  static Reg fma(Reg a, Reg b, Reg c) { return add(mul(a, b), c); }
  static Reg max(Reg a, Reg b) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  static Reg round(Reg a) {
    for (int i = 0; i < kWidth; ++i) a.lane[i] = nearbyintf(a.lane[i]);
    return a;
  }
  // 2^a for whole a in [-126, 127].
  static Reg pow2(Reg a) {
    uint32_t bits[kWidth];
    for (int i = 0; i < kWidth; ++i) bits[i] = static_cast<uint32_t>(a.lane[i] + 127.0f) << 23;
    memcpy(a.lane, bits, sizeof(bits));
    return a;
  }
  static void sum4(const Reg* v, float* out) {
    for (int r = 0; r < 4; ++r) {
      const float* x = v[r].lane;
      out[r] = ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
    }
  }
};

}  // namespace

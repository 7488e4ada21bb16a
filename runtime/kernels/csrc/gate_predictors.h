// Predictors made of the gate itself: a copy in low bits, or its signs alone. They read rows of
// their own and none of the gate's.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "linear.h"
#include "predictor.h"

namespace hotneuron {

// score = copy of the gate in 8 bits times x in int8 groups (kernels.h).
class GatePredictor final : public Predictor {
 public:
  // The copy, of type q8, must outlive this object.
  GatePredictor(const Matrix& copy_FD, int64_t block_size, float threshold)
      : Predictor(copy_FD.num_rows, block_size, threshold), copy_FD_(copy_FD) {}

  const Inputs* prepare(const Vectors& x, int64_t num_tokens) const override;
  void scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
              int64_t apart) const override;

 private:
  Matrix copy_FD_;
};

// The same of a copy in 4 bits and strips (kernels.h): all of it is read for every token, and its
// rows are never asked for one by one.
class GateStripsPredictor final : public Predictor {
 public:
  // What `copy` points to must outlive this object.
  GateStripsPredictor(const Strips& copy, int64_t block_size, float threshold)
      : Predictor(copy.num_rows, block_size, threshold), copy_(copy) {}

  const Inputs* prepare(const Vectors& x, int64_t num_tokens) const override;
  void scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
              int64_t apart) const override;

 private:
  Strips copy_;
};

// score = signs of x and of the gate's row that agree, less those that do not. A sign is a bit, set
// above zero.
class SignPredictor final : public Predictor {
 public:
  // bits_FB has row_bytes for each neuron, eight columns per byte, and must outlive this object.
  SignPredictor(const uint8_t* bits_FB, int64_t row_bytes, int64_t num_neurons, int64_t block_size,
                float threshold)
      : Predictor(num_neurons, block_size, threshold), bits_FB_(bits_FB), row_bytes_(row_bytes) {}

  const Inputs* prepare(const Vectors& x, int64_t num_tokens) const override;
  void scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
              int64_t apart) const override;

 private:
  const uint8_t* bits_FB_;
  int64_t row_bytes_;
};

}  // namespace hotneuron

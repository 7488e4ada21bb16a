// Predictors made of the gate itself: a copy in low bits, or its signs alone. They read rows of
// their own and none of the gate's.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "predictor.h"

namespace hotneuron {

// score = copy of the gate times x in int8 groups (kernels.h).
class GatePredictor final : public Predictor {
 public:
  // The rows must outlive this object.
  GatePredictor(const GroupRows& rows, int64_t block_size, float threshold)
      : Predictor(rows.count, block_size, threshold), rows_(rows) {}

  const Inputs* prepare(const float* x_ND, int64_t num_tokens) const override;
  void scores(int64_t block, const Inputs* inputs, int64_t token, float* score) const override;

 private:
  GroupRows rows_;
};

// score = signs of x and of the gate's row that agree, less those that do not. A sign is a bit, set
// above zero.
class SignPredictor final : public Predictor {
 public:
  // bits_FB has row_bytes for each neuron, eight columns per byte, and must outlive this object.
  SignPredictor(const uint8_t* bits_FB, int64_t row_bytes, int64_t num_neurons, int64_t block_size,
                float threshold)
      : Predictor(num_neurons, block_size, threshold), bits_FB_(bits_FB), row_bytes_(row_bytes) {}

  const Inputs* prepare(const float* x_ND, int64_t num_tokens) const override;
  void scores(int64_t block, const Inputs* inputs, int64_t token, float* score) const override;

 private:
  const uint8_t* bits_FB_;
  int64_t row_bytes_;
};

}  // namespace hotneuron

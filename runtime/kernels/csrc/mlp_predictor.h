// The predictor that is a small network: score = relu(x fc1^T + bias_R) fc2^T + bias_F, with int8
// rows and fp32 row scales, or in 4 bits.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "linear.h"
#include "predictor.h"

namespace hotneuron {

struct MlpWeights {
  Matrix fc1_RD;
  const float* fc1_scale_R;
  const float* bias_R;
  // [block, R, neuron of the block]: the weights of one hidden unit lie together, so those of a unit
  // that is zero are not read.
  const int8_t* fc2_BRS;
  const float* fc2_scale_F;
  const float* bias_F;
};

class MlpPredictor final : public Predictor {
 public:
  // What `weights` points to must outlive this object.
  MlpPredictor(const MlpWeights& weights, int64_t num_neurons, int64_t block_size,
               float threshold)
      : Predictor(num_neurons, block_size, threshold), weights_(weights) {}

  const Inputs* prepare(const Vectors& x, int64_t num_tokens) const override;
  void scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
              int64_t apart) const override;

 private:
  struct Hidden;
  void scores_of(int64_t block, const Hidden& hidden, float* score) const;
  int64_t rank() const { return weights_.fc1_RD.num_rows; }
  Rows columns(int64_t block) const;

  MlpWeights weights_;
};

// Both matrices in strips (kernels.h), read as a whole for every token: half of the rows of 128 bytes
// that the network in int8 reads cost as much time as all of them. Hidden units are rounded to int8
// as the inputs are.
struct Int4MlpWeights {
  Strips fc1_RD;
  const float* bias_R;
  Strips fc2_FR;
  const float* bias_F;
};

class Int4MlpPredictor final : public Predictor {
 public:
  // What `weights` points to must outlive this object.
  Int4MlpPredictor(const Int4MlpWeights& weights, int64_t block_size, float threshold)
      : Predictor(weights.fc2_FR.num_rows, block_size, threshold), weights_(weights) {}

  const Inputs* prepare(const Vectors& x, int64_t num_tokens) const override;
  void scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
              int64_t apart) const override;

 private:
  Int4MlpWeights weights_;
};

}  // namespace hotneuron

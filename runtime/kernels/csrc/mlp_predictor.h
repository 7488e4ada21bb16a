// The predictor that is a small network: score = relu(x fc1^T + bias_R) fc2^T + bias_F, int8 rows
// with fp32 row scales.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "predictor.h"

namespace hotneuron {

struct MlpWeights {
  Matrix fc1_RD;
  const float* fc1_scale_R;
  const float* bias_R;
  Matrix fc2_FR;
  const float* fc2_scale_F;
  const float* bias_F;
};

class MlpPredictor final : public Predictor {
 public:
  // fc2 is copied; everything else must outlive this object.
  MlpPredictor(const MlpWeights& weights, int64_t block_size, float threshold);

  const Inputs* prepare(const Vectors& x, int64_t num_tokens) const override;
  void scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
              int64_t apart) const override;

 private:
  struct Hidden;
  void scores_of(int64_t block, const Hidden& hidden, float* score) const;
  int64_t rank() const { return weights_.fc1_RD.num_rows; }
  Rows columns(int64_t block) const;

  MlpWeights weights_;
  // [block][R][neuron of the block]: the weights of one hidden unit lie together, so those of a
  // unit that is zero are not read.
  std::vector<int8_t> fc2_blocks_;
};

}  // namespace hotneuron

// A layer's predictor: score = relu(x fc1^T + bias_R) fc2^T + bias_F, int8 rows with fp32 row
// scales.
//
// Works by the same blocks of neurons as the FFN (sparse_ffn.h), so that a block can be scored
// right before its gates are read.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "linear.h"

namespace hotneuron {

struct MlpWeights {
  Matrix fc1_RD;
  const float* fc1_scale_R;
  const float* bias_R;
  Matrix fc2_FR;
  const float* fc2_scale_F;
  const float* bias_F;
  float threshold;
};

class MlpPredictor {
 public:
  // fc2 is copied; everything else must outlive this object.
  MlpPredictor(const MlpWeights& weights, int64_t block_size);

  // One token's hidden units that are not zero behind the ReLU.
  struct Hidden {
    const float* value;
    const int32_t* unit;
    int64_t count;
  };
  // Of all tokens, in the calling thread's scratch memory until its next call.
  const Hidden* hidden(const float* x_ND, int64_t num_tokens) const;

  // Scores of the block's neurons.
  void scores(int64_t block, const Hidden& hidden, float* score) const;
  // Writes the block's neurons that are selected, ascending, as offsets into the block, and returns
  // their number. The first num_hot are selected without asking.
  int64_t select(int64_t block, const Hidden& hidden, int64_t num_hot, int32_t* selected) const;

  void set_threshold(float threshold) { weights_.threshold = threshold; }

 private:
  int64_t rank() const { return weights_.fc1_RD.num_rows; }
  int64_t num_neurons() const { return weights_.fc2_FR.num_rows; }
  int64_t count(int64_t block) const;
  Rows columns(int64_t block) const;

  MlpWeights weights_;
  int64_t block_size_;
  // [block][R][neuron of the block]: the weights of one hidden unit lie together, so those of a
  // unit that is zero are not read.
  std::vector<int8_t> fc2_blocks_;
};

}  // namespace hotneuron

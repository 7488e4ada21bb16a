// The sparse FFN of one layer: y = (act(x gate^T) * (x up^T)) down, act(g) = g if g > threshold.
//
// Neuron i is row i of gate, up and down (down is stored transposed). Neurons are cut into fixed
// blocks; a block is one task: which neurons may fire, their gates, up and down of those that do,
// into a partial sum of its own. The partial sums are then added in block order. So each thread
// reads whole rows, and neither threads, batch mates nor the mode change the order of any sum: a
// neuron that does not fire adds an exact zero in dense mode and nothing in the others.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "linear.h"

namespace hotneuron {

enum class Mode { dense, exact, predicted };
Mode mode_from(const std::string& name);  // throws std::invalid_argument

// relu(x fc1^T + bias_R) fc2^T + bias_F, with int8 rows times fp32 row scales.
struct Predictor {
  Matrix fc1_RD;
  const float* fc1_scale_R;
  const float* bias_R;
  const float* fc2_scale_F;
  const float* bias_F;
  float threshold;
  int64_t rank = 0;
  std::vector<int8_t> fc2_blocks;  // [block][R][neuron of the block]
};

class SparseFfn {
 public:
  // The three matrices are [F, D], of one dtype, and must outlive this object.
  SparseFfn(Matrix gate_FD, Matrix up_FD, Matrix down_FD, float threshold);

  void set_predictor(const Matrix& fc1_RD, const float* fc1_scale_R, const float* bias_R,
                     const Matrix& fc2_FR, const float* fc2_scale_F, const float* bias_F,
                     float threshold);
  void set_predictor_threshold(float threshold);
  void set_counter(int64_t* counter_F);

  // y_ND = ffn(x_ND), or += with `accumulate`. `always_hot`: neurons selected without being asked.
  void forward(const float* x_ND, int64_t num_tokens, Mode mode, int64_t always_hot, float* y_ND,
               bool accumulate);
  void forward_residual(float* x_ND, int64_t num_tokens, const Norm& norm, Mode mode,
                        int64_t always_hot);

  void activations(const float* x_ND, int64_t num_tokens, float* h_NF);
  void scores(const float* x_ND, int64_t num_tokens, float* score_NF);
  void select(const float* x_ND, int64_t num_tokens, int64_t always_hot, uint8_t* mask_NF);

  // Per token of the last forward: gate rows read, and neurons with h != 0.
  struct Counts {
    std::vector<int64_t> selected_N, active_N;
  };
  Counts last_counts();

  int64_t num_neurons() const { return gate_FD_.num_rows; }
  int64_t width() const { return gate_FD_.num_columns; }
  int64_t rank() const { return predictor_.rank; }
  bool has_predictor() const { return predictor_.rank > 0; }

 private:
  struct Call;

  int64_t num_blocks() const { return (num_neurons() + block_size_ - 1) / block_size_; }
  int64_t block_begin(int64_t block) const { return block * block_size_; }
  int64_t block_count(int64_t block) const;

  void require_predictor() const;
  float act(float gate) const { return gate > threshold_ ? gate : 0.0f; }
  void hidden(const float* x_ND, int64_t num_tokens, float* hidden_NR) const;
  void block_scores(int64_t block, const float* hidden_R, float* score) const;
  int64_t select_in_block(int64_t block, const float* hidden_R, int64_t always_hot,
                          int32_t* selected) const;
  void dense_block(const Call& call, int64_t block);
  void sparse_block(const Call& call, int64_t block);
  int64_t fire(const Call& call, int64_t block, const float* x_D, const float* gates,
               const int32_t* selected, int64_t num_selected, float* partial_D);
  void activations_of(int64_t block, const float* x_ND, int64_t num_tokens, float* h,
                      int64_t ldh) const;

  Matrix gate_FD_, up_FD_, down_FD_;
  float threshold_;
  int64_t block_size_;
  Predictor predictor_{};
  int64_t* counter_F_ = nullptr;
  Counts counts_;
  std::mutex mutex_;  // one call at a time: guards counts, counter and the predictor's threshold
};

}  // namespace hotneuron

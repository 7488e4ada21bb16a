// The FFN of one layer: y = (act(x gate^T) * (x up^T)) down; act is FATReLU, g if g > threshold, or
// SiLU, which is never zero and runs dense only.
//
// Neuron i is row i of gate, up and down (down is stored transposed). Neurons are cut into fixed
// blocks, and the blocks into fixed parts; a part is one task. Block by block: which neurons may
// fire, their gates, up and down of those that do, into the part's sum. These sums are then added
// in a fixed tree. So each thread reads whole rows, and neither threads, batch mates nor the mode
// change the order of any sum: a neuron that does not fire adds an exact zero in dense mode and
// nothing in the others.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ffn_usage.h"
#include "kernels.h"
#include "linear.h"
#include "predictor.h"

namespace hotneuron {

class ReadingOrder;

struct Activation {
  bool is_silu;
  float threshold;  // of FATReLU
};

Mode mode_from(const std::string& name);  // throws std::invalid_argument
const char* name_of(Mode mode);

class SparseFfn {
 public:
  // The three matrices are [F, D], of one dtype, and must outlive this object. Up and down of a
  // neuron may lie side by side, which costs less where few neurons fire.
  SparseFfn(Matrix gate_FD, Matrix up_FD, Matrix down_FD, Activation activation);

  // Made for this FFN's neurons, width and block size.
  void set_predictor(std::unique_ptr<Predictor> predictor);
  void set_predictor_threshold(float threshold);
  void set_counter(int64_t* counter_F);  // null: none

  // y_ND = ffn(x_ND), or += with `accumulate`. `always_hot`: neurons selected without being asked.
  void forward(const float* x_ND, int64_t num_tokens, Mode mode, int64_t always_hot, float* y_ND,
               bool accumulate);
  // The same as predicted mode, with a selection made elsewhere: a byte per neuron, 0 or 1.
  void forward_selected(const float* x_ND, int64_t num_tokens, const uint8_t* mask_NF, float* y_ND);
  // x_ND += ffn(rms_norm(x_ND))
  void forward_residual(float* x_ND, int64_t num_tokens, const Norm& norm, Mode mode,
                        int64_t always_hot);

  // h = act(gate) * up of every neuron; scores and selection as predicted mode makes them.
  void activations(const float* x_ND, int64_t num_tokens, float* h_NF);
  void scores(const float* x_ND, int64_t num_tokens, float* score_NF);
  void select(const float* x_ND, int64_t num_tokens, int64_t always_hot, uint8_t* mask_NF);

  // Per token of the last forward: gate rows read, and neurons with h != 0.
  struct Counts {
    std::vector<int64_t> selected_N, active_N;
  };
  Counts last_counts();

  // All that `forward` did since the last time this was asked.
  FfnUsage take_usage();

  int64_t num_neurons() const { return gate_FD_.num_rows; }
  int64_t width() const { return gate_FD_.num_columns; }
  int64_t block_size() const { return block_size_; }

 private:
  struct Call;
  struct Flight;

  struct Selection {
    const Predictor::Inputs* inputs;  // of this FFN's predictor, once they are prepared
    const uint8_t* mask_NF;           // or a selection made elsewhere
    int64_t always_hot;
  };
  void run(const float* x_ND, int64_t num_tokens, Mode mode, Selection selection, float* y_ND,
           bool accumulate);
  int64_t num_blocks() const { return (num_neurons() + block_size_ - 1) / block_size_; }
  int64_t num_parts() const;
  int64_t begin_of(int64_t block) const { return block * block_size_; }
  int64_t count_of(int64_t block) const;
  Rows block_of(const Matrix& matrix_FD, int64_t block) const;
  int64_t num_hot_in(int64_t block, int64_t always_hot) const;
  const Predictor& predictor() const;  // throws if there is none
  float fatrelu(float gate) const { return gate > activation_.threshold ? gate : 0.0f; }
  Vectors vectors(const float* x_ND, int64_t num_tokens) const;

  void activations_of(int64_t block, const Vectors& x, int64_t num_tokens, float* h,
                      int64_t ldh) const;
  void multiply_by_up(const Rows& up_rows, const Vectors& x, int64_t num_tokens, float* h,
                      int64_t ldh) const;
  void dense_block(const Call& call, int64_t block, float* partial_ND, StageTimer& timer);
  void sparse_blocks(const Call& call, int64_t begin, int64_t end, float* partial_ND,
                     StageTimer& timer);
  void count(const Call& call);
  void choose(const Call& call, const Flight& flight) const;
  void take_mask(const Call& call, const Flight& flight) const;
  void unite(const Call& call, const Flight& flight) const;
  void add_chosen(const Call& call, const Flight& flight, const Rows& rows,
                  ReadingOrder& order) const;
  void add_gates(const Call& call, const Flight& flight, ReadingOrder& order) const;
  void add_fired(const Call& call, const Flight& flight, ReadingOrder& order) const;
  void multiply_chosen(const Call& call, const Flight& flight, const Rows& matrix,
                       ReadingOrder& order, float* product) const;
  void compute_gates(const Call& call, const Flight& flight, ReadingOrder& order) const;
  void fire(const Call& call, const Flight& flight, ReadingOrder& order);

  Matrix gate_FD_, up_FD_, down_FD_;
  Activation activation_;
  int64_t block_size_, width_of_sums_;
  bool is_side_by_side_;
  std::unique_ptr<Predictor> predictor_;
  int64_t* counter_F_ = nullptr;
  Counts counts_;
  FfnUsage usage_;
  std::mutex mutex_;  // one call at a time: guards all that changes
};

}  // namespace hotneuron

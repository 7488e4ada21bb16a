#include "sparse_ffn.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"

namespace hotneuron {
namespace {

// Many tasks per thread for small layers, partial sums that cost little beside rows for large ones.
constexpr int64_t kSmallBlock = 64, kLargeBlock = 128;
constexpr int64_t kLargeLayer = 4096;
constexpr int64_t kReduceWidth = 512;

struct NormedTag;
struct HiddenTag;
struct PartialTag;
struct CountTag;
struct GateTag;
struct UpTag;
struct OnesTag;
struct SumTag;

}  // namespace

Mode mode_from(const std::string& name) {
  if (name == "dense") return Mode::dense;
  if (name == "exact") return Mode::exact;
  if (name == "predicted") return Mode::predicted;
  throw std::invalid_argument("mode must be 'dense', 'exact' or 'predicted', is '" + name + "'.");
}

// What the tasks of one forward share.
struct SparseFfn::Call {
  const float* x_ND;
  int64_t num_tokens;
  Mode mode;
  int64_t always_hot;
  const float* hidden_NR;
  float* partial_BND;    // one partial sum per block and token
  int64_t* selected_BN;  // counts per block and token
  int64_t* active_BN;
};

SparseFfn::SparseFfn(Matrix gate_FD, Matrix up_FD, Matrix down_FD, float threshold)
    : gate_FD_(gate_FD),
      up_FD_(up_FD),
      down_FD_(down_FD),
      threshold_(threshold),
      block_size_(gate_FD.num_rows > kLargeLayer ? kLargeBlock : kSmallBlock) {}

int64_t SparseFfn::block_count(int64_t block) const {
  return std::min(block_size_, num_neurons() - block_begin(block));
}

void SparseFfn::set_predictor(const Matrix& fc1_RD, const float* fc1_scale_R, const float* bias_R,
                              const Matrix& fc2_FR, const float* fc2_scale_F, const float* bias_F,
                              float threshold) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t rank = fc1_RD.num_rows;
  predictor_ = {fc1_RD, fc1_scale_R, bias_R, fc2_scale_F, bias_F, threshold, rank, {}};
  // A column of a block is one cache line or two: a hidden unit that is zero costs nothing.
  predictor_.fc2_blocks.resize(num_blocks() * rank * block_size_);
  const int8_t* fc2 = static_cast<const int8_t*>(fc2_FR.data);
  for (int64_t f = 0; f < num_neurons(); ++f) {
    int8_t* block = predictor_.fc2_blocks.data() + f / block_size_ * rank * block_size_;
    for (int64_t r = 0; r < rank; ++r) block[r * block_size_ + f % block_size_] = fc2[f * rank + r];
  }
}

void SparseFfn::set_predictor_threshold(float threshold) {
  require_predictor();
  std::lock_guard<std::mutex> lock(mutex_);
  predictor_.threshold = threshold;
}

void SparseFfn::set_counter(int64_t* counter_F) {
  std::lock_guard<std::mutex> lock(mutex_);
  counter_F_ = counter_F;
}

void SparseFfn::require_predictor() const {
  if (has_predictor()) return;
  throw std::invalid_argument(
      "This FFN has no predictor. Run `train-predictors` for the model, or use mode 'exact'.");
}

void SparseFfn::hidden(const float* x_ND, int64_t num_tokens, float* hidden_NR) const {
  linear(x_ND, num_tokens, predictor_.fc1_RD, hidden_NR, false);
  const int64_t R = rank();
  for (int64_t n = 0; n < num_tokens; ++n) {
    for (int64_t r = 0; r < R; ++r) {
      float& unit = hidden_NR[n * R + r];
      unit = predictor_.fc1_scale_R[r] * unit + predictor_.bias_R[r];
      unit = unit < 0.0f ? 0.0f : unit;  // a NaN stays one and selects nothing
    }
  }
}

void SparseFfn::block_scores(int64_t block, const float* hidden_R, float* score) const {
  const int64_t R = rank(), count = block_count(block), begin = block_begin(block);
  std::fill_n(score, count, 0.0f);
  const Rows columns = {predictor_.fc2_blocks.data() + block * R * block_size_, DType::i8,
                        block_size_, count, R};
  kernels().add_rows(columns, hidden_R, R, 1, score, count);
  for (int64_t i = 0; i < count; ++i) {
    score[i] = predictor_.fc2_scale_F[begin + i] * score[i] + predictor_.bias_F[begin + i];
  }
}

// Writes the block's selected neurons, ascending, as offsets into the block; returns their number.
int64_t SparseFfn::select_in_block(int64_t block, const float* hidden_R, int64_t always_hot,
                                   int32_t* selected) const {
  float score[kLargeBlock];
  block_scores(block, hidden_R, score);
  const int64_t count = block_count(block);
  const int64_t num_hot = std::clamp<int64_t>(always_hot - block_begin(block), 0, count);
  int64_t num_selected = num_hot;
  std::iota(selected, selected + num_hot, 0);
  for (int64_t i = num_hot; i < count; ++i) {
    selected[num_selected] = static_cast<int32_t>(i);
    num_selected += score[i] > predictor_.threshold;
  }
  return num_selected;
}

// h[n, i] of the whole block, reading all its gate and up rows.
void SparseFfn::activations_of(int64_t block, const float* x_ND, int64_t num_tokens, float* h,
                               int64_t ldh) const {
  const int64_t begin = block_begin(block), count = block_count(block), D = width();
  const Kernels& k = kernels();
  float* up = scratch<UpTag>(num_tokens * block_size_);
  k.dot_rows(gate_FD_.rows().slice(begin, count), x_ND, D, num_tokens, h, ldh, false);
  k.dot_rows(up_FD_.rows().slice(begin, count), x_ND, D, num_tokens, up, block_size_, false);
  for (int64_t n = 0; n < num_tokens; ++n) {
    for (int64_t i = 0; i < count; ++i) {
      h[n * ldh + i] = act(h[n * ldh + i]) * up[n * block_size_ + i];
    }
  }
}

void SparseFfn::dense_block(const Call& call, int64_t block) {
  const int64_t begin = block_begin(block), count = block_count(block), D = width();
  const int64_t N = call.num_tokens;
  float* h = scratch<GateTag>(N * block_size_);
  activations_of(block, call.x_ND, N, h, block_size_);
  float* partial_ND = call.partial_BND + block * N * D;
  std::fill_n(partial_ND, N * D, 0.0f);
  kernels().add_rows(down_FD_.rows().slice(begin, count), h, block_size_, N, partial_ND, D);
  for (int64_t n = 0; n < N; ++n) {
    int64_t num_active = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_active = h[n * block_size_ + i] != 0.0f;
      num_active += is_active;
      if (counter_F_) counter_F_[begin + i] += is_active;
    }
    call.selected_BN[block * N + n] = count;
    call.active_BN[block * N + n] = num_active;
  }
}

void SparseFfn::sparse_block(const Call& call, int64_t block) {
  const int64_t begin = block_begin(block), count = block_count(block), D = width();
  const int64_t N = call.num_tokens, R = rank();
  const Rows gate = gate_FD_.rows().slice(begin, count);
  const Kernels& k = kernels();
  float* gates = scratch<GateTag>(N * block_size_);
  int32_t selected[kLargeBlock];
  if (call.mode == Mode::exact) {
    k.dot_rows(gate, call.x_ND, D, N, gates, block_size_, false);
    std::iota(selected, selected + count, 0);
  }
  for (int64_t n = 0; n < N; ++n) {
    const float* x_D = call.x_ND + n * D;
    float* gates_of_token = gates + n * block_size_;
    int64_t num_selected = count;
    if (call.mode == Mode::predicted) {
      num_selected = select_in_block(block, call.hidden_NR + n * R, call.always_hot, selected);
      k.dot_rows(gate.listed(selected, num_selected), x_D, D, 1, gates_of_token, 0, false);
    }
    float* partial_D = call.partial_BND + (block * N + n) * D;
    std::fill_n(partial_D, D, 0.0f);
    call.selected_BN[block * N + n] = num_selected;
    call.active_BN[block * N + n] =
        fire(call, block, x_D, gates_of_token, selected, num_selected, partial_D);
  }
}

// Up and down of the selected neurons whose gate fires, for one token; returns how many are active.
int64_t SparseFfn::fire(const Call&, int64_t block, const float* x_D, const float* gates,
                        const int32_t* selected, int64_t num_selected, float* partial_D) {
  const int64_t begin = block_begin(block), count = block_count(block), D = width();
  const Kernels& k = kernels();
  int32_t fired[kLargeBlock];
  float gate[kLargeBlock], h[kLargeBlock];
  int64_t num_fired = 0;
  for (int64_t i = 0; i < num_selected; ++i) {
    gate[num_fired] = act(gates[i]);
    fired[num_fired] = selected[i];
    num_fired += gate[num_fired] != 0.0f;
  }
  k.dot_rows(up_FD_.rows().slice(begin, count).listed(fired, num_fired), x_D, D, 1, h, 0, false);

  int64_t num_active = 0;
  for (int64_t i = 0; i < num_fired; ++i) {
    h[num_active] = gate[i] * h[i];
    fired[num_active] = fired[i];
    num_active += h[num_active] != 0.0f;
  }
  k.add_rows(down_FD_.rows().slice(begin, count).listed(fired, num_active), h, 0, 1, partial_D, 0);
  if (counter_F_) {
    for (int64_t i = 0; i < num_active; ++i) counter_F_[begin + fired[i]] += 1;
  }
  return num_active;
}

void SparseFfn::forward(const float* x_ND, int64_t num_tokens, Mode mode, int64_t always_hot,
                        float* y_ND, bool accumulate) {
  if (mode == Mode::predicted) require_predictor();
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t N = num_tokens, D = width(), B = num_blocks();

  float* hidden_NR = nullptr;
  if (mode == Mode::predicted) {
    hidden_NR = scratch<HiddenTag>(N * rank());
    hidden(x_ND, N, hidden_NR);
  }
  float* partial_BND = scratch<PartialTag>(B * N * D);
  int64_t* counts_2BN = scratch<CountTag, int64_t>(2 * B * N);
  const Call call = {x_ND,      N,           mode,       always_hot,
                     hidden_NR, partial_BND, counts_2BN, counts_2BN + B * N};
  parallel_for(B, [&](int64_t block) {
    if (mode == Mode::dense) {
      dense_block(call, block);
    } else {
      sparse_block(call, block);
    }
  });

  float* ones = scratch<OnesTag>(B);
  std::fill_n(ones, B, 1.0f);
  const Kernels& k = kernels();
  const int64_t size = N * D;
  parallel_for((size + kReduceWidth - 1) / kReduceWidth, [&](int64_t task) {
    const int64_t begin = task * kReduceWidth, count = std::min(kReduceWidth, size - begin);
    const Rows partials = {partial_BND + begin, DType::f32, size, count, B};
    float sum[kReduceWidth] = {};
    k.add_rows(partials, ones, 0, 1, sum, 0);
    for (int64_t i = 0; i < count; ++i) {
      y_ND[begin + i] = accumulate ? y_ND[begin + i] + sum[i] : sum[i];
    }
  });

  counts_.selected_N.assign(N, 0);
  counts_.active_N.assign(N, 0);
  for (int64_t i = 0; i < B * N; ++i) {
    counts_.selected_N[i % N] += call.selected_BN[i];
    counts_.active_N[i % N] += call.active_BN[i];
  }
}

void SparseFfn::forward_residual(float* x_ND, int64_t num_tokens, const Norm& norm, Mode mode,
                                 int64_t always_hot) {
  float* normed_ND = scratch<NormedTag>(num_tokens * width());
  rms_norm(x_ND, num_tokens, width(), norm, normed_ND);
  forward(normed_ND, num_tokens, mode, always_hot, x_ND, true);
}

void SparseFfn::activations(const float* x_ND, int64_t num_tokens, float* h_NF) {
  parallel_for(num_blocks(), [&](int64_t block) {
    activations_of(block, x_ND, num_tokens, h_NF + block_begin(block), num_neurons());
  });
}

void SparseFfn::scores(const float* x_ND, int64_t num_tokens, float* score_NF) {
  require_predictor();
  float* hidden_NR = scratch<HiddenTag>(num_tokens * rank());
  hidden(x_ND, num_tokens, hidden_NR);
  parallel_for(num_blocks(), [&](int64_t block) {
    for (int64_t n = 0; n < num_tokens; ++n) {
      block_scores(block, hidden_NR + n * rank(),
                   score_NF + n * num_neurons() + block_begin(block));
    }
  });
}

void SparseFfn::select(const float* x_ND, int64_t num_tokens, int64_t always_hot,
                       uint8_t* mask_NF) {
  require_predictor();
  std::lock_guard<std::mutex> lock(mutex_);
  float* hidden_NR = scratch<HiddenTag>(num_tokens * rank());
  hidden(x_ND, num_tokens, hidden_NR);
  std::fill_n(mask_NF, num_tokens * num_neurons(), uint8_t{0});
  parallel_for(num_blocks(), [&](int64_t block) {
    int32_t selected[kLargeBlock];
    for (int64_t n = 0; n < num_tokens; ++n) {
      const int64_t count = select_in_block(block, hidden_NR + n * rank(), always_hot, selected);
      uint8_t* mask = mask_NF + n * num_neurons() + block_begin(block);
      for (int64_t i = 0; i < count; ++i) mask[selected[i]] = 1;
    }
  });
}

SparseFfn::Counts SparseFfn::last_counts() {
  std::lock_guard<std::mutex> lock(mutex_);
  return counts_;
}

}  // namespace hotneuron

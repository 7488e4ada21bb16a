#include "mlp_predictor.h"

#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "scratch.h"

namespace hotneuron {
namespace {

constexpr int64_t kLargestBlock = 128;

struct HiddenTag;
struct AheadTag;

}  // namespace

MlpPredictor::MlpPredictor(const MlpWeights& weights, int64_t block_size)
    : weights_(weights), block_size_(block_size) {
  const int64_t F = num_neurons(), R = rank();
  fc2_blocks_.resize((F + block_size - 1) / block_size * R * block_size);
  const int8_t* fc2_FR = static_cast<const int8_t*>(weights.fc2_FR.data);
  for (int64_t f = 0; f < F; ++f) {
    int8_t* block = fc2_blocks_.data() + f / block_size * R * block_size;
    for (int64_t r = 0; r < R; ++r) block[r * block_size + f % block_size] = fc2_FR[f * R + r];
  }
}

int64_t MlpPredictor::count(int64_t block) const {
  return std::min(block_size_, num_neurons() - block * block_size_);
}

Rows MlpPredictor::columns(int64_t block) const {
  const int8_t* first = fc2_blocks_.data() + block * rank() * block_size_;
  return {first, DType::i8, block_size_, count(block), rank()};
}

const MlpPredictor::Hidden* MlpPredictor::hidden(const float* x_ND, int64_t num_tokens) const {
  const int64_t R = rank();
  float* value_NR = scratch<HiddenTag>(num_tokens * R);
  int32_t* unit_NR = scratch<HiddenTag, int32_t>(num_tokens * R);
  Hidden* hidden_N = scratch<HiddenTag, Hidden>(num_tokens);
  linear(x_ND, num_tokens, weights_.fc1_RD, value_NR, false);
  for (int64_t n = 0; n < num_tokens; ++n) {
    float* value = value_NR + n * R;
    int32_t* unit = unit_NR + n * R;
    int64_t count = 0;
    for (int64_t r = 0; r < R; ++r) {
      const float sum = weights_.fc1_scale_R[r] * value[r] + weights_.bias_R[r];
      value[count] = sum;
      unit[count] = static_cast<int32_t>(r);
      count += !(sum <= 0.0f);  // a NaN is kept and selects nothing
    }
    hidden_N[n] = {value, unit, count};
  }
  return hidden_N;
}

void MlpPredictor::scores(int64_t block, const Hidden& hidden, float* score) const {
  const int64_t size = count(block), begin = block * block_size_;
  std::fill_n(score, size, 0.0f);
  // While a column is used, the same column of the next block is asked for.
  const Rows now = columns(block), next = begin + size < num_neurons() ? columns(block + 1) : now;
  const void** ahead = scratch<AheadTag, const void*>(rank());
  for (int64_t i = 0; i < hidden.count; ++i) ahead[i] = next.row(hidden.unit[i]);
  kernels().add_rows(now.listed(hidden.unit, hidden.count, ahead), hidden.value, 0, 1, score, 0);
  for (int64_t i = 0; i < size; ++i) {
    score[i] = weights_.fc2_scale_F[begin + i] * score[i] + weights_.bias_F[begin + i];
  }
}

int64_t MlpPredictor::select(int64_t block, const Hidden& hidden, int64_t num_hot,
                             int32_t* selected) const {
  float score[kLargestBlock];
  scores(block, hidden, score);
  const int64_t size = count(block);
  int64_t num_selected = num_hot;
  std::iota(selected, selected + num_hot, 0);
  for (int64_t i = num_hot; i < size; ++i) {
    selected[num_selected] = static_cast<int32_t>(i);
    num_selected += score[i] > weights_.threshold;
  }
  return num_selected;
}

}  // namespace hotneuron

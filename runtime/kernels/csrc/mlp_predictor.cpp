#include "mlp_predictor.h"

#include <algorithm>

#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"

namespace hotneuron {
namespace {

constexpr int64_t kTasksPerThread = 6;

struct HiddenTag;
struct AheadTag;

struct RoundedHidden : Predictor::Inputs {
  Vectors hidden;
};

// A NaN stays one and selects nothing.
float relu(float sum) { return sum <= 0.0f ? 0.0f : sum; }

}  // namespace

// One token's hidden units that are not zero behind the ReLU.
struct MlpPredictor::Hidden : Predictor::Inputs {
  const float* value;
  const int32_t* unit;
  int64_t count;
};

Rows MlpPredictor::columns(int64_t block) const {
  const int8_t* first = weights_.fc2_BRS + begin(block) * rank();
  return {first, DType::i8, block_size(), count(block), rank()};
}

const Predictor::Inputs* MlpPredictor::prepare(const Vectors& x, int64_t num_tokens) const {
  const int64_t R = rank();
  float* value_NR = scratch<HiddenTag>(num_tokens * R);
  int32_t* unit_NR = scratch<HiddenTag, int32_t>(num_tokens * R);
  Hidden* hidden_N = scratch<HiddenTag, Hidden>(num_tokens);
  linear(x.x, num_tokens, weights_.fc1_RD, value_NR, false);
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
    hidden_N[n] = {{}, value, unit, count};
  }
  return hidden_N;
}

void MlpPredictor::scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
                          int64_t apart) const {
  const Hidden* hidden_N = static_cast<const Hidden*>(inputs);
  for (int64_t n = 0; n < num_tokens; ++n) scores_of(block, hidden_N[n], score + n * apart);
}

void MlpPredictor::scores_of(int64_t block, const Hidden& hidden, float* score) const {
  const int64_t size = count(block), first = begin(block);
  std::fill_n(score, size, 0.0f);
  // While a column is used, the same column of the next block is asked for.
  const Rows now = columns(block), next = first + size < num_neurons() ? columns(block + 1) : now;
  const void** ahead = scratch<AheadTag, const void*>(rank());
  for (int64_t i = 0; i < hidden.count; ++i) ahead[i] = next.row(hidden.unit[i]);
  kernels().add_rows(now.listed(hidden.unit, hidden.count, ahead), hidden.value, 0, 1, score, 0);
  for (int64_t i = 0; i < size; ++i) {
    score[i] = weights_.fc2_scale_F[first + i] * score[i] + weights_.bias_F[first + i];
  }
}

const Predictor::Inputs* Int4MlpPredictor::prepare(const Vectors& x, int64_t num_tokens) const {
  const Strips& fc1 = weights_.fc1_RD;
  const int64_t R = fc1.num_rows, D = fc1.num_groups * kGroup;
  const Vectors from = x.q ? x : vectors_for(DType::q8, x.x, num_tokens, D);
  float* hidden_NR = scratch<HiddenTag>(num_tokens * R);
  const int64_t strips =
      std::max<int64_t>(1, fc1.num_strips() / (kTasksPerThread * num_threads()));
  parallel_for((fc1.num_strips() + strips - 1) / strips, [&](int64_t task) {
    const int64_t first = task * strips * kStripRows;
    const int64_t count = std::min(strips * kStripRows, R - first);
    kernels().dot_strips(fc1.part(first, count), from, num_tokens, hidden_NR + first, R);
    for (int64_t n = 0; n < num_tokens; ++n) {
      float* hidden = hidden_NR + n * R + first;
      for (int64_t i = 0; i < count; ++i) hidden[i] = relu(hidden[i] + weights_.bias_R[first + i]);
    }
  });
  RoundedHidden* inputs = scratch<HiddenTag, RoundedHidden>(1);
  *inputs = {{}, more_vectors_for(DType::q8, hidden_NR, num_tokens, R)};
  return inputs;
}

void Int4MlpPredictor::scores(int64_t block, const Inputs* inputs, int64_t num_tokens,
                              float* score, int64_t apart) const {
  const Vectors& hidden = static_cast<const RoundedHidden*>(inputs)->hidden;
  const int64_t first = begin(block), size = count(block);
  kernels().dot_strips(weights_.fc2_FR.part(first, size), hidden, num_tokens, score, apart);
  for (int64_t n = 0; n < num_tokens; ++n) {
    for (int64_t i = 0; i < size; ++i) score[n * apart + i] += weights_.bias_F[first + i];
  }
}

}  // namespace hotneuron

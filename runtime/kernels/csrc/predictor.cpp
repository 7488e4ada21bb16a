#include "predictor.h"

#include <algorithm>
#include <numeric>

#include "scratch.h"

namespace hotneuron {
namespace {

struct ScoreTag;

}  // namespace

int64_t Predictor::count(int64_t block) const {
  return std::min(block_size_, num_neurons_ - begin(block));
}

void Predictor::select(int64_t block, const Inputs* inputs, int64_t num_tokens, int64_t num_hot,
                       int32_t* selected, int64_t* num_selected_N) const {
  float* score = scratch<ScoreTag>(num_tokens * block_size_);
  scores(block, inputs, num_tokens, score, block_size_);
  const int64_t size = count(block);
  for (int64_t n = 0; n < num_tokens; ++n, score += block_size_, selected += block_size_) {
    int64_t num_selected = num_hot;
    std::iota(selected, selected + num_hot, 0);
    for (int64_t i = num_hot; i < size; ++i) {
      selected[num_selected] = static_cast<int32_t>(i);
      num_selected += score[i] > threshold_;
    }
    num_selected_N[n] = num_selected;
  }
}

}  // namespace hotneuron

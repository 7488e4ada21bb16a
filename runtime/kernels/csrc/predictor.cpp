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

int64_t Predictor::select(int64_t block, const Inputs* inputs, int64_t token, int64_t num_hot,
                          int32_t* selected) const {
  float* score = scratch<ScoreTag>(block_size_);
  scores(block, inputs, token, score);
  const int64_t size = count(block);
  int64_t num_selected = num_hot;
  std::iota(selected, selected + num_hot, 0);
  for (int64_t i = num_hot; i < size; ++i) {
    selected[num_selected] = static_cast<int32_t>(i);
    num_selected += score[i] > threshold_;
  }
  return num_selected;
}

}  // namespace hotneuron

// A layer's predictor as its FFN sees it: scores of a block of neurons, and which of them to look
// at.
//
// Works by the same blocks of neurons as the FFN (sparse_ffn.h), so that a block can be scored
// right before its gates are read.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hotneuron {

class Predictor {
 public:
  Predictor(int64_t num_neurons, int64_t block_size, float threshold)
      : num_neurons_(num_neurons), block_size_(block_size), threshold_(threshold) {}
  virtual ~Predictor() = default;
  Predictor(const Predictor&) = delete;
  Predictor& operator=(const Predictor&) = delete;

  // What a kind makes of all tokens before any block is scored.
  struct Inputs {};
  // In the calling thread's scratch memory until its next call. x may be rounded already.
  virtual const Inputs* prepare(const Vectors& x, int64_t num_tokens) const = 0;
  // Scores of the block's neurons for each token; those of a token are `apart` from the next one's.
  virtual void scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
                      int64_t apart) const = 0;

  // Writes for each token the block's neurons that are selected, ascending, as offsets into the
  // block, block_size apart, and their number. The first num_hot are selected without asking.
  void select(int64_t block, const Inputs* inputs, int64_t num_tokens, int64_t num_hot,
              int32_t* selected, int64_t* num_selected_N) const;

  void set_threshold(float threshold) { threshold_ = threshold; }

 protected:
  int64_t num_neurons() const { return num_neurons_; }
  int64_t block_size() const { return block_size_; }
  int64_t begin(int64_t block) const { return block * block_size_; }
  int64_t count(int64_t block) const;

 private:
  int64_t num_neurons_, block_size_;
  float threshold_;
};

}  // namespace hotneuron

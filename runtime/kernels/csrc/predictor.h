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
  // Scores of the block's neurons for a token.
  virtual void scores(int64_t block, const Inputs* inputs, int64_t token, float* score) const = 0;

  // Writes the block's neurons that are selected, ascending, as offsets into the block, and returns
  // their number. The first num_hot are selected without asking.
  int64_t select(int64_t block, const Inputs* inputs, int64_t token, int64_t num_hot,
                 int32_t* selected) const;

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

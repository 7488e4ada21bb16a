#include "gate_predictors.h"

#include "dispatch.h"
#include "scratch.h"

namespace hotneuron {
namespace {

constexpr int64_t kSignsPerByte = 8;

struct RoundedTag;
struct SignsTag;

struct RoundedInputs : Predictor::Inputs {
  Vectors x;
};

struct SignInputs : Predictor::Inputs {
  const uint8_t* bits_NB;
};

// In the same way for every type of groups.
const Predictor::Inputs* rounded(const Vectors& x, int64_t num_tokens, int64_t width) {
  RoundedInputs* inputs = scratch<RoundedTag, RoundedInputs>(1);
  *inputs = {{}, x.q ? x : vectors_for(DType::q8, x.x, num_tokens, width)};
  return inputs;
}

}  // namespace

const Predictor::Inputs* GatePredictor::prepare(const Vectors& x, int64_t num_tokens) const {
  return rounded(x, num_tokens, copy_FD_.num_columns);
}

void GatePredictor::scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
                           int64_t apart) const {
  const Vectors& x = static_cast<const RoundedInputs*>(inputs)->x;
  const Rows rows = copy_FD_.rows().part(begin(block), count(block));
  kernels().dot_rows(rows, x, num_tokens, score, apart, false);
}

const Predictor::Inputs* GateStripsPredictor::prepare(const Vectors& x, int64_t num_tokens) const {
  return rounded(x, num_tokens, copy_.num_groups * kGroup);
}

void GateStripsPredictor::scores(int64_t block, const Inputs* inputs, int64_t num_tokens,
                                 float* score, int64_t apart) const {
  const Vectors& x = static_cast<const RoundedInputs*>(inputs)->x;
  kernels().dot_strips(copy_.part(begin(block), count(block)), x, num_tokens, score, apart);
}

const Predictor::Inputs* SignPredictor::prepare(const Vectors& x_ND, int64_t num_tokens) const {
  const int64_t size = num_tokens * row_bytes_;
  uint8_t* bits_NB = scratch<SignsTag, uint8_t>(size);
  for (int64_t b = 0; b < size; ++b) {
    const float* x = x_ND.x + b * kSignsPerByte;
    int bits = 0;
    for (int i = 0; i < kSignsPerByte; ++i) bits |= (x[i] > 0.0f) << i;
    bits_NB[b] = static_cast<uint8_t>(bits);
  }
  SignInputs* inputs = scratch<SignsTag, SignInputs>(1);
  *inputs = {{}, bits_NB};
  return inputs;
}

void SignPredictor::scores(int64_t block, const Inputs* inputs, int64_t num_tokens, float* score,
                           int64_t apart) const {
  const uint8_t* bits_NB = static_cast<const SignInputs*>(inputs)->bits_NB;
  const uint8_t* rows = bits_FB_ + begin(block) * row_bytes_;
  for (int64_t n = 0; n < num_tokens; ++n) {
    const uint8_t* x = bits_NB + n * row_bytes_;
    kernels().count_signs(rows, row_bytes_, count(block), x, score + n * apart);
  }
}

}  // namespace hotneuron

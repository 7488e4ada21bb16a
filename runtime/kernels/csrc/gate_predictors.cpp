#include "gate_predictors.h"

#include "dispatch.h"
#include "scratch.h"

namespace hotneuron {
namespace {

constexpr int64_t kSignsPerByte = 8;

struct GroupsTag;
struct SignsTag;

struct GroupInputs : Predictor::Inputs {
  const int8_t* q_ND;
  const float* scale_NC;
};

struct SignInputs : Predictor::Inputs {
  const uint8_t* bits_NB;
};

}  // namespace

const Predictor::Inputs* GatePredictor::prepare(const float* x_ND, int64_t num_tokens) const {
  const int64_t num_groups = num_tokens * rows_.num_groups;
  int8_t* q_ND = scratch<GroupsTag, int8_t>(num_groups * kGroup);
  float* scale_NC = scratch<GroupsTag>(num_groups);
  kernels().round_groups(x_ND, num_groups, q_ND, scale_NC);
  GroupInputs* inputs = scratch<GroupsTag, GroupInputs>(1);
  *inputs = {{}, q_ND, scale_NC};
  return inputs;
}

void GatePredictor::scores(int64_t block, const Inputs* inputs, int64_t token, float* score) const {
  const GroupInputs* all = static_cast<const GroupInputs*>(inputs);
  const int64_t C = rows_.num_groups;
  const GroupedInput x = {all->q_ND + token * C * kGroup, all->scale_NC + token * C};
  kernels().dot_groups(rows_.part(begin(block), count(block)), x, score);
}

const Predictor::Inputs* SignPredictor::prepare(const float* x_ND, int64_t num_tokens) const {
  const int64_t size = num_tokens * row_bytes_;
  uint8_t* bits_NB = scratch<SignsTag, uint8_t>(size);
  for (int64_t b = 0; b < size; ++b) {
    const float* x = x_ND + b * kSignsPerByte;
    int bits = 0;
    for (int i = 0; i < kSignsPerByte; ++i) bits |= (x[i] > 0.0f) << i;
    bits_NB[b] = static_cast<uint8_t>(bits);
  }
  SignInputs* inputs = scratch<SignsTag, SignInputs>(1);
  *inputs = {{}, bits_NB};
  return inputs;
}

void SignPredictor::scores(int64_t block, const Inputs* inputs, int64_t token, float* score) const {
  const uint8_t* x = static_cast<const SignInputs*>(inputs)->bits_NB + token * row_bytes_;
  const uint8_t* rows = bits_FB_ + begin(block) * row_bytes_;
  kernels().count_signs(rows, row_bytes_, count(block), x, score);
}

}  // namespace hotneuron

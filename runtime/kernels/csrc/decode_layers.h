// The layers of a decode step in one call: with small models, going back to the caller between
// layers takes longer than some of the layers' parts.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "sparse_ffn.h"

namespace hotneuron {

struct DecodeLayer {
  const AttentionBlock* attention;
  Norm ffn_norm;
  SparseFfn* ffn;
};

// Tokens begin to end - 1 run their FFNs in one mode.
struct ModeRun {
  int64_t begin, end;
  Mode mode;
};

struct LayerSeconds {
  double attention = 0, ffn = 0;
};

// x_ND += attention(x), x_ND += ffn(x), layer by layer; D is `width`. Returns what both took in all.
LayerSeconds forward_layers(const std::vector<DecodeLayer>& layers, float* x_ND, int64_t width,
                            const KvBatch& kv, const std::vector<ModeRun>& runs);

}  // namespace hotneuron

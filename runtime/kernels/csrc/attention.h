// Decode attention against one contiguous cache per sequence, and the block around it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "linear.h"

namespace hotneuron {

// The caches of a step's tokens. A cache is [L, 2, G, S_cap, K]: keys, then values, of each layer.
struct KvBatch {
  struct Token {
    char* cache;
    int64_t capacity;  // S_cap
    int64_t position;  // row of the token's own key and value; rows 0..position are attended to
  };
  std::vector<Token> tokens;
  DType dtype;
  int64_t num_layers, num_kv_heads, head_dim;

  // Keys (part 0) or values (part 1) of one kv head: [S_cap, K].
  char* head(const Token& token, int64_t layer, int part, int64_t kv_head) const {
    const int64_t index = (layer * 2 + part) * num_kv_heads + kv_head;
    return token.cache + index * token.capacity * head_dim * bytes_of(dtype, 1);
  }
};

struct Rope {
  const float* cos_SK;  // [positions, K / 2]
  const float* sin_SK;
};

// Rotates q and k of qkv_NC in place, appends k and v to the caches, attends: out_N(HK).
void attention(float* qkv_NC, const KvBatch& kv, int64_t layer, const Rope& rope, int64_t num_heads,
               float* out_NC);

struct AttentionBlock {
  int64_t layer, num_heads;
  Norm norm;
  Matrix qkv_CD, o_DC;
  Rope rope;

  // x_ND += attention(rms_norm(x) qkv^T) o^T
  void forward(float* x_ND, const KvBatch& kv) const;
};

}  // namespace hotneuron

// Decode attention against keys and values in blocks, and the attention block around it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "linear.h"

namespace hotneuron {

// Where the keys and values of a step's tokens live. A pool is [B, L, 2, G, T, K]: blocks of T
// positions, in each the keys, then the values, of each layer. A sequence's position p is row p % T
// of the block that stands at p / T in its table.
struct KvBatch {
  struct Token {
    char* pool;
    int64_t table;     // where its blocks begin in `blocks`
    int64_t position;  // of the token's own key and value; positions 0..position are attended to
  };
  std::vector<Token> tokens;
  std::vector<int64_t> blocks;  // the tables, one behind the other
  DType dtype;
  int64_t num_layers, num_kv_heads, block_size, head_dim;

  int64_t row_bytes() const { return bytes_of(dtype, head_dim); }
  // Keys (part 0) or values (part 1) of one kv head in block `index` of the token's table: [T, K].
  char* rows(const Token& token, int64_t index, int64_t layer, int part, int64_t kv_head) const {
    const int64_t block = blocks[token.table + index];
    const int64_t head = ((block * num_layers + layer) * 2 + part) * num_kv_heads + kv_head;
    return token.pool + head * block_size * row_bytes();
  }
};

struct Rope {
  const float* cos_SK;  // [positions, K / 2]
  const float* sin_SK;
};

// Rotates q and k of qkv_NC in place, writes k and v to the pools, attends: out_N(HK).
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

// Attention in spans of kSpan cached positions, each a task of its own: scores, a softmax part
// (max, sum) and the weighted values. Spans are joined in order afterwards, so a long context is
// shared by all threads, and a token's result depends on its own sequence only. Within a span each
// position is computed by itself or added in its turn, so the size and place of the blocks that
// hold it change no bit.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "bf16.h"
#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"

namespace hotneuron {
namespace {

constexpr int64_t kSpan = 128;

struct QkvTag;
struct AttendedTag;
struct ScoreTag;
struct PartTag;
struct TaskTag;

// Half-split rotary: element i pairs with i + half.
void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

void rotate_and_append(float* qkv_C, const KvBatch& kv, const KvBatch::Token& token, int64_t layer,
                       const Rope& rope, int64_t num_heads) {
  const int64_t K = kv.head_dim, half = K / 2, G = kv.num_kv_heads;
  const float* cos = rope.cos_SK + token.position * half;
  const float* sin = rope.sin_SK + token.position * half;
  for (int64_t head = 0; head < num_heads + G; ++head) rotate(qkv_C + head * K, cos, sin, half);
  const int64_t block = token.position / kv.block_size;
  const int64_t row_offset = token.position % kv.block_size * kv.row_bytes();
  for (int part = 0; part < 2; ++part) {
    for (int64_t g = 0; g < G; ++g) {
      const float* source = qkv_C + (num_heads + part * G + g) * K;
      store_floats(source, K, kv.dtype, kv.rows(token, block, layer, part, g) + row_offset);
    }
  }
}

struct Task {
  int64_t token, kv_head, begin;
};

struct Part {
  float max, sum;
};

int64_t spans_of(const KvBatch::Token& token) { return token.position / kSpan + 1; }

// Calls work(rows, first) for the keys or values of positions begin to end, block by block; `first`
// is that of the rows' first position in the span. While a row is read, the same row of the block
// behind it is asked for.
template <class Work>
void for_blocks(const KvBatch& kv, const KvBatch::Token& token, int64_t layer, int part,
                int64_t kv_head, int64_t begin, int64_t end, const Work& work) {
  const int64_t T = kv.block_size, stride = kv.row_bytes(), last_block = token.position / T;
  const void* ahead[kSpan];
  for (int64_t at = begin; at < end;) {
    const int64_t block = at / T, row = at % T, count = std::min(T - row, end - at);
    const char* data = kv.rows(token, block, layer, part, kv_head) + row * stride;
    const char* next =
        kv.rows(token, std::min(block + 1, last_block), layer, part, kv_head) + row * stride;
    for (int64_t i = 0; i < count; ++i) ahead[i] = next + i * stride;
    Rows rows = {data, kv.dtype, stride, kv.head_dim, count};
    rows.ahead = ahead;
    work(rows, at - begin);
    at += count;
  }
}

}  // namespace

void attention(float* qkv_NC, const KvBatch& kv, int64_t layer, const Rope& rope, int64_t num_heads,
               float* out_NC) {
  const int64_t N = static_cast<int64_t>(kv.tokens.size());
  const int64_t K = kv.head_dim, G = kv.num_kv_heads, H = num_heads;
  const int64_t heads_per_kv = H / G, qkv_width = (H + 2 * G) * K;
  const float scale = 1.0f / std::sqrt(static_cast<float>(K));
  const Kernels& k = kernels();

  int64_t num_tasks = 0;
  for (const KvBatch::Token& token : kv.tokens) num_tasks += spans_of(token) * G;
  Task* tasks = scratch<TaskTag, Task>(num_tasks);
  int64_t t = 0;
  for (int64_t n = 0; n < N; ++n) {
    rotate_and_append(qkv_NC + n * qkv_width, kv, kv.tokens[n], layer, rope, H);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t b = 0; b < spans_of(kv.tokens[n]); ++b) tasks[t++] = {n, g, b * kSpan};
    }
  }

  // Per task and query head: a Part and a value sum of width K.
  Part* parts = scratch<PartTag, Part>(num_tasks * heads_per_kv);
  float* sums = scratch<PartTag>(num_tasks * heads_per_kv * K);
  parallel_for(num_tasks, [&](int64_t i) {
    const Task& task = tasks[i];
    const KvBatch::Token& token = kv.tokens[task.token];
    const int64_t end = std::min(task.begin + kSpan, token.position + 1);
    const float* q = qkv_NC + task.token * qkv_width + task.kv_head * heads_per_kv * K;
    float* scores = scratch<ScoreTag>(heads_per_kv * kSpan);
    for_blocks(kv, token, layer, 0, task.kv_head, task.begin, end,
               [&](const Rows& keys, int64_t first) {
                 k.dot_rows(keys, {q, K}, heads_per_kv, scores + first, kSpan, false);
               });
    for (int64_t h = 0; h < heads_per_kv; ++h) {
      const SoftmaxPart part = k.softmax_part(scores + h * kSpan, scale, end - task.begin);
      parts[i * heads_per_kv + h] = {part.max, part.sum};
    }
    float* sum = sums + i * heads_per_kv * K;
    std::fill_n(sum, heads_per_kv * K, 0.0f);
    for_blocks(kv, token, layer, 1, task.kv_head, task.begin, end,
               [&](const Rows& values, int64_t first) {
                 k.add_rows(values, scores + first, kSpan, heads_per_kv, sum, K);
               });
  });

  t = 0;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t num_spans = spans_of(kv.tokens[n]);
    for (int64_t g = 0; g < G; ++g, t += num_spans) {
      for (int64_t h = 0; h < heads_per_kv; ++h) {
        float max = parts[t * heads_per_kv + h].max;
        for (int64_t b = 1; b < num_spans; ++b) {
          max = std::max(max, parts[(t + b) * heads_per_kv + h].max);
        }
        float* out = out_NC + (n * H + g * heads_per_kv + h) * K;
        std::fill_n(out, K, 0.0f);
        float total = 0.0f;
        for (int64_t b = 0; b < num_spans; ++b) {
          const int64_t i = (t + b) * heads_per_kv + h;
          const float weight = std::exp(parts[i].max - max);
          total += weight * parts[i].sum;
          for (int64_t c = 0; c < K; ++c) out[c] += weight * sums[i * K + c];
        }
        for (int64_t c = 0; c < K; ++c) out[c] /= total;
      }
    }
  }
}

void AttentionBlock::forward(float* x_ND, const KvBatch& kv) const {
  const int64_t N = static_cast<int64_t>(kv.tokens.size());
  float* qkv_NC = scratch<QkvTag>(N * qkv_CD.num_rows);
  float* attended_NC = scratch<AttendedTag>(N * o_DC.num_columns);
  norm_linear(x_ND, N, norm, qkv_CD, qkv_NC);
  attention(qkv_NC, kv, layer, rope, num_heads, attended_NC);
  linear(attended_NC, N, o_DC, x_ND, true);
}

}  // namespace hotneuron

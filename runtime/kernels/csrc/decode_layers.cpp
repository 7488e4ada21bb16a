#include "decode_layers.h"

#include <chrono>

namespace hotneuron {

LayerSeconds forward_layers(const std::vector<DecodeLayer>& layers, float* x_ND, int64_t width,
                            const KvBatch& kv, const std::vector<ModeRun>& runs) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::duration time) {
    return std::chrono::duration<double>(time).count();
  };
  LayerSeconds sum;
  Clock::time_point start = Clock::now();
  for (const DecodeLayer& layer : layers) {
    layer.attention->forward(x_ND, kv);
    const Clock::time_point attended = Clock::now();
    for (const ModeRun& run : runs) {
      layer.ffn->forward_residual(x_ND + run.begin * width, run.end - run.begin, layer.ffn_norm,
                                  run.mode, 0);
    }
    const Clock::time_point end = Clock::now();
    sum.attention += seconds(attended - start);
    sum.ffn += seconds(end - attended);
    start = end;
  }
  return sum;
}

}  // namespace hotneuron

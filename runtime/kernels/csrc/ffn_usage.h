// What an FFN did and where its threads spent their time. Counted in every call, so it has to cost
// next to nothing: a clock is read a few times per block of neurons.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <utility>

#ifdef HOTNEURON_X86
#include <x86intrin.h>
#endif

namespace hotneuron {

enum class Mode { dense, exact, predicted };

enum Stage { kSelect, kGate, kUpDown, kNumStages };

// Of a clock that is read in a few nanoseconds. Its rate does not matter: only shares are used.
inline uint64_t ticks_now() {
#ifdef HOTNEURON_X86
  return __rdtsc();
#else
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

// Of one thread's task; in a cache line of its own.
struct alignas(64) StageTicks {
  uint64_t of[kNumStages];
};

// Gives the time since the last lap to a stage.
class StageTimer {
 public:
  explicit StageTimer(StageTicks& ticks) : ticks_(ticks), last_(ticks_now()) { ticks_ = {}; }

  void lap(Stage stage) {
    const uint64_t now = ticks_now();
    ticks_.of[stage] += now - last_;
    last_ = now;
  }

 private:
  StageTicks& ticks_;
  uint64_t last_;
};

struct FfnUsage {
  // Sums over calls. `united`: neurons that fire for at least one of a call's tokens.
  struct Counts {
    int64_t calls = 0, selected = 0, active = 0, united = 0;
  };
  std::map<std::pair<Mode, int64_t>, Counts> counts;  // by mode and tokens per call

  // Parts of the calls' duration: each stage's share of the time of all threads, and what is left,
  // in which threads wait.
  double seconds[kNumStages] = {}, wait_seconds = 0;

  // A call of `duration` on `num_threads` threads, by `num_ticks` of the same time.
  void add_times(std::chrono::duration<double> duration, uint64_t num_ticks, int num_threads,
                 const StageTicks& busy) {
    const double all = duration.count();
    const double each = num_ticks ? all / (static_cast<double>(num_ticks) * num_threads) : 0;
    double rest = all;
    for (int stage = 0; stage < kNumStages; ++stage) {
      const double part = each * static_cast<double>(busy.of[stage]);
      seconds[stage] += part;
      rest -= part;
    }
    wait_seconds += rest > 0 ? rest : 0;
  }
};

}  // namespace hotneuron

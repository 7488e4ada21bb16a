// A persistent pool for loops of a few microseconds: `parallel_for(count, body)` runs
// body(0..count).
//
// Each thread, the caller too, starts with an equal range of the indices and then helps the others
// out. Nobody waits for a thread that has not taken an index, so a worker without a core (a busy
// machine, a forked child) holds a loop up by one index at most. Which thread runs an index is
// open: bodies must write disjoint results and must not start loops of their own.
#pragma once

#include <cstdint>

namespace hotneuron {

// Threads that take part in a loop, the caller included.
int num_threads();
// Ends the workers and starts others at the next loop; 0: default_num_threads().
void set_num_threads(int count);
// How long a thread without work looks for some before it sleeps; 0: the default, for loops that
// follow each other at once. Longer where an accelerator's part of each layer comes between.
void set_spin_time(int64_t microseconds);
// The affinity mask, capped by the cgroup's CPU quota.
int default_num_threads();

void parallel_for_raw(int64_t count, void (*body)(void* context, int64_t index), void* context);

template <class Body>
void parallel_for(int64_t count, Body&& body) {
  parallel_for_raw(
      count, [](void* context, int64_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

}  // namespace hotneuron

#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace hotneuron {
namespace {

// Layers follow each other within a few microseconds; a server without requests must burn no core.
constexpr int64_t kSpinMicroseconds = 50;
std::atomic<int64_t> spin_microseconds{kSpinMicroseconds};
constexpr int kPausesPerClock = 32;
constexpr int64_t kMaxIndices = 0xFFFF;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True as soon as ready() is, false after the spin time.
template <class Ready>
bool spin_until(Ready ready) {
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::microseconds(spin_microseconds.load(std::memory_order_relaxed));
  do {
    for (int i = 0; i < kPausesPerClock; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class ThreadPool {
 public:
  int num_threads() {
    std::lock_guard<std::mutex> lock(caller_mutex_);
    return wanted_threads();
  }

  void resize(int count) {
    std::lock_guard<std::mutex> lock(caller_mutex_);
    stop_workers();
    num_threads_ = count;
  }

  void run(int64_t count, void (*body)(void*, int64_t), void* context) {
    std::lock_guard<std::mutex> lock(caller_mutex_);
    if (wanted_threads() == 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i) body(context, i);
      return;
    }
    if (workers_.empty()) start_workers();
    for (int64_t begin = 0; begin < count; begin += kMaxIndices) {
      run_indices(begin, std::min(count - begin, kMaxIndices), body, context);
    }
  }

 private:
  // What is left of a thread's range in a loop: epoch << 32 | end << 16 | next. An index is taken
  // by compare-and-swap on the whole word, so none can be taken of a loop that has ended; and while
  // someone holds an index, that loop cannot end, so its fields stay valid.
  struct alignas(64) Range {
    std::atomic<uint64_t> left{0};
  };
  static uint64_t next_of(uint64_t left) { return left & 0xFFFF; }
  static uint64_t end_of(uint64_t left) { return left >> 16 & 0xFFFF; }

  int wanted_threads() {
    if (num_threads_ == 0) num_threads_ = default_num_threads();
    return num_threads_;
  }

  void run_indices(int64_t begin, int64_t count, void (*body)(void*, int64_t), void* context) {
    body_ = body;
    context_ = context;
    begin_ = begin;
    num_done_.store(0, std::memory_order_relaxed);
    const uint64_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    for (int64_t t = 0; t < num_threads_; ++t) {
      const uint64_t next = count * t / num_threads_, end = count * (t + 1) / num_threads_;
      ranges_[t].left.store(epoch << 32 | end << 16 | next, std::memory_order_release);
    }
    epoch_.store(epoch);  // seq_cst: see sleep()
    if (num_sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
    take_indices(0);
    const auto all_done = [&] { return num_done_.load(std::memory_order_acquire) == count; };
    while (!spin_until(all_done)) std::this_thread::yield();  // a worker lost its core
  }

  // Reports what it did once per loop: the count is the one thing that all threads write to.
  void take_indices(int thread) {
    int64_t num_done = 0;
    for (int i = 0; i < num_threads_; ++i) {
      std::atomic<uint64_t>& left = ranges_[(thread + i) % num_threads_].left;
      uint64_t seen = left.load(std::memory_order_acquire);
      while (next_of(seen) < end_of(seen)) {
        if (!left.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire)) continue;
        body_(context_, begin_ + static_cast<int64_t>(next_of(seen)));
        ++num_done;
        seen = left.load(std::memory_order_acquire);
      }
    }
    if (num_done > 0) num_done_.fetch_add(num_done, std::memory_order_release);
  }

  void work(int thread) {
    uint64_t seen_epoch = 0;
    const auto has_work = [&] { return stopping_.load() || epoch_.load() != seen_epoch; };
    while (!stopping_.load()) {
      seen_epoch = epoch_.load();
      take_indices(thread);
      if (!spin_until(has_work)) sleep(has_work);
    }
  }

  // Either the sleeper sees the new epoch, or the caller sees the sleeper: both are seq_cst.
  template <class Ready>
  void sleep(Ready ready) {
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    num_sleeping_.fetch_add(1);
    wake_.wait(lock, ready);
    num_sleeping_.fetch_sub(1);
  }

  void start_workers() {
    ranges_ = std::make_unique<Range[]>(num_threads_);
    for (int i = 1; i < num_threads_; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  void stop_workers() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stopping_.store(true);
      wake_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
  }

  std::mutex caller_mutex_;  // one loop at a time; guards the fields down to begin_
  int num_threads_ = 0;
  std::vector<std::thread> workers_;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t begin_ = 0;

  std::unique_ptr<Range[]> ranges_;
  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

ThreadPool& pool() {
  static ThreadPool* const instance = new ThreadPool;  // never freed: workers may outlive statics
  return *instance;
}

// Cores' worth of CPU time that cgroup v2 grants, or 0 if there is no limit.
int cgroup_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  return std::max(1, static_cast<int>(std::ceil(std::atof(quota.c_str()) / period)));
}

}  // namespace

int default_num_threads() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) count = CPU_COUNT(&cpus);
#endif
  const int quota = cgroup_quota();
  if (quota > 0) count = std::min(count, quota);
  return std::max(1, count);
}

int num_threads() { return pool().num_threads(); }
void set_num_threads(int count) { pool().resize(count); }
void set_spin_time(int64_t microseconds) {
  spin_microseconds.store(microseconds > 0 ? microseconds : kSpinMicroseconds);
}

void parallel_for_raw(int64_t count, void (*body)(void*, int64_t), void* context) {
  if (count > 0) pool().run(count, body, context);
}

}  // namespace hotneuron

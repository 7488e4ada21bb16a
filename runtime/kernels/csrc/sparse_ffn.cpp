#include "sparse_ffn.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "dispatch.h"
#include "reading_order.h"
#include "scratch.h"
#include "thread_pool.h"

namespace hotneuron {
namespace {

constexpr int64_t kSmallBlock = 64, kLargeBlock = 128;
// Each part has a sum of its own: enough of them to share out, and no more.
constexpr int64_t kSmallParts = 8, kLargeParts = 32;
constexpr int64_t kLargeLayer = 4096;

// Neurons that dense mode takes at once where up and down lie side by side: as many rows as add_rows
// does at once, so that memory is read from one end to the other.
int64_t dense_step(DType dtype, const Vectors& x) {
  if (x.tiles) return kTileRows;
  return is_grouped(dtype) ? 4 : 8;
}

struct NormedTag;
struct PartialTag;
struct CountTag;
struct UnitedCountTag;
struct TicksTag;
struct GateTag;
struct UpTag;
struct ChosenTag;
struct UnitedTag;
struct ProductTag;

}  // namespace

Mode mode_from(const std::string& name) {
  if (name == "dense") return Mode::dense;
  if (name == "exact") return Mode::exact;
  if (name == "predicted") return Mode::predicted;
  throw std::invalid_argument("mode must be 'dense', 'exact' or 'predicted', is '" + name + "'.");
}

const char* name_of(Mode mode) {
  return mode == Mode::dense ? "dense" : mode == Mode::exact ? "exact" : "predicted";
}

// What the tasks of one forward share.
struct SparseFfn::Call {
  Vectors x;
  int64_t num_tokens;
  Mode mode;
  bool unites_rows;  // each is multiplied with all tokens, also with those that did not choose it
  Selection selection;               // in predicted mode
  float* partial_PND;                // one partial sum per part and token (width_of_sums)
  int64_t *selected_BN, *active_BN;  // counts per block and token
  int64_t* united_B;                 // neurons of the block that fire for any token
};

// A block on its way through the stages of `sparse_blocks`.
struct SparseFfn::Flight {
  int64_t block;
  float* partial_ND;
  float* gates;     // [N, block size]: of the token's chosen neurons, in their order
  int32_t* chosen;  // [N, block size]: offsets into the block, ascending
  int64_t* num_chosen_N;
  // Where rows are read once for all tokens: those that any token has chosen.
  int32_t* united;
  int64_t* num_united;
};

SparseFfn::SparseFfn(Matrix gate_FD, Matrix up_FD, Matrix down_FD, Activation activation)
    : gate_FD_(gate_FD),
      up_FD_(up_FD),
      down_FD_(down_FD),
      activation_(activation),
      block_size_(gate_FD.num_rows > kLargeLayer ? kLargeBlock : kSmallBlock),
      width_of_sums_(hotneuron::width_of_sums(gate_FD.dtype, gate_FD.num_columns)),
      is_side_by_side_(up_FD.stride > up_FD.rows().record_bytes()) {}

int64_t SparseFfn::num_parts() const {
  return std::min(num_blocks(), num_neurons() > kLargeLayer ? kLargeParts : kSmallParts);
}

int64_t SparseFfn::count_of(int64_t block) const {
  return std::min(block_size_, num_neurons() - begin_of(block));
}

Rows SparseFfn::block_of(const Matrix& matrix_FD, int64_t block) const {
  return matrix_FD.rows().part(begin_of(block), count_of(block));
}

int64_t SparseFfn::num_hot_in(int64_t block, int64_t always_hot) const {
  return std::clamp<int64_t>(always_hot - begin_of(block), 0, count_of(block));
}

void SparseFfn::set_predictor(std::unique_ptr<Predictor> predictor) {
  std::lock_guard<std::mutex> lock(mutex_);
  predictor_ = std::move(predictor);
}

void SparseFfn::set_predictor_threshold(float threshold) {
  std::lock_guard<std::mutex> lock(mutex_);
  predictor();
  predictor_->set_threshold(threshold);
}

void SparseFfn::set_counter(int64_t* counter_F) {
  std::lock_guard<std::mutex> lock(mutex_);
  counter_F_ = counter_F;
}

const Predictor& SparseFfn::predictor() const {
  if (predictor_) return *predictor_;
  throw std::invalid_argument(
      "This FFN has no predictor. Run `train-predictors` for the model, or use mode 'exact'.");
}

// Gate and up read the same ones.
Vectors SparseFfn::vectors(const float* x_ND, int64_t num_tokens) const {
  return vectors_for(gate_FD_.dtype, x_ND, num_tokens, width());
}

// h[n, i] of the whole block, reading all its gate and up rows.
void SparseFfn::activations_of(int64_t block, const Vectors& x, int64_t num_tokens, float* h,
                               int64_t ldh) const {
  kernels().dot_rows(block_of(gate_FD_, block), x, num_tokens, h, ldh, false);
  multiply_by_up(block_of(up_FD_, block), x, num_tokens, h, ldh);
}

// h = act(h) * up, for gates h[n, i] of these rows.
void SparseFfn::multiply_by_up(const Rows& up_rows, const Vectors& x, int64_t num_tokens, float* h,
                               int64_t ldh) const {
  const int64_t count = up_rows.count;
  float* up = scratch<UpTag>(num_tokens * count);
  kernels().dot_rows(up_rows, x, num_tokens, up, count, false);
  for (int64_t n = 0; n < num_tokens; ++n) {
    float* h_n = h + n * ldh;
    const float* up_n = up + n * count;
    if (activation_.is_silu) {
      kernels().silu_times(h_n, up_n, count, h_n);
    } else {
      for (int64_t i = 0; i < count; ++i) h_n[i] = fatrelu(h_n[i]) * up_n[i];
    }
  }
}

void SparseFfn::dense_block(const Call& call, int64_t block, float* partial_ND,
                            StageTimer& timer) {
  const int64_t begin = begin_of(block), count = count_of(block), N = call.num_tokens;
  float* h = scratch<GateTag>(N * block_size_);
  kernels().dot_rows(block_of(gate_FD_, block), call.x, N, h, block_size_, false);
  timer.lap(kGate);
  const int64_t step = is_side_by_side_ ? dense_step(gate_FD_.dtype, call.x) : count;
  for (int64_t i = 0; i < count; i += step) {
    const int64_t first = begin + i, size = std::min(step, count - i);
    multiply_by_up(up_FD_.rows().part(first, size), call.x, N, h + i, block_size_);
    kernels().add_rows(down_FD_.rows().part(first, size), h + i, block_size_, N, partial_ND,
                       width_of_sums_);
  }
  bool fires[kLargeBlock] = {};
  for (int64_t n = 0; n < N; ++n) {
    int64_t num_active = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_active = h[n * block_size_ + i] != 0.0f;
      num_active += is_active;
      fires[i] |= is_active;
      if (counter_F_) counter_F_[begin + i] += is_active;
    }
    call.selected_BN[block * N + n] = count;
    call.active_BN[block * N + n] = num_active;
  }
  call.united_B[block] = std::count(fires, fires + count, true);
  timer.lap(kUpDown);
}

// Rows that are not neighbours come slowly unless they are asked for in time, and they are only
// known once the stage before is done. So blocks go through three stages, one block apart: the rows
// of each stage are known while the stages of other blocks compute.
void SparseFfn::sparse_blocks(const Call& call, int64_t begin, int64_t end, float* partial_ND,
                              StageTimer& timer) {
  constexpr int kStages = 3;
  const int64_t N = call.num_tokens;
  float* gates = scratch<GateTag>(kStages * N * block_size_);
  int32_t* chosen = scratch<ChosenTag, int32_t>(kStages * N * block_size_);
  int64_t* num_chosen = scratch<ChosenTag, int64_t>(kStages * N);
  int32_t* united = scratch<UnitedTag, int32_t>(kStages * block_size_);
  int64_t num_united[kStages];
  const auto flight = [&](int64_t block) -> Flight {
    const int64_t stage = block % kStages, slot = stage * N;
    return {block,
            partial_ND,
            gates + slot * block_size_,
            chosen + slot * block_size_,
            num_chosen + slot,
            united + stage * block_size_,
            num_united + stage};
  };
  ReadingOrder order(4 * N * block_size_, rows_ahead(bytes_of(gate_FD_.dtype, width()), 4));
  for (int64_t step = begin; step < end + kStages - 1; ++step) {
    const bool chooses = step < end, gates_run = begin < step && step <= end;
    const bool fires = begin + 1 < step;
    if (chooses) choose(call, flight(step));
    order.clear();
    if (gates_run) add_gates(call, flight(step - 1), order);
    if (fires) add_fired(call, flight(step - 2), order);
    if (chooses) add_gates(call, flight(step), order);
    order.finish();
    timer.lap(kSelect);
    if (gates_run) compute_gates(call, flight(step - 1), order);
    timer.lap(kGate);
    if (fires) fire(call, flight(step - 2), order);
    timer.lap(kUpDown);
  }
}

// Which gates to compute: the predictor's selection, or all.
void SparseFfn::choose(const Call& call, const Flight& flight) const {
  const int64_t N = call.num_tokens, count = count_of(flight.block);
  if (call.mode == Mode::predicted) {
    if (call.selection.mask_NF) {
      take_mask(call, flight);
    } else {
      predictor_->select(flight.block, call.selection.inputs, N,
                         num_hot_in(flight.block, call.selection.always_hot), flight.chosen,
                         flight.num_chosen_N);
    }
    if (call.unites_rows) unite(call, flight);
  } else {
    for (int64_t n = 0; n < N; ++n) {
      std::iota(flight.chosen + n * block_size_, flight.chosen + n * block_size_ + count, 0);
      flight.num_chosen_N[n] = count;
    }
  }
  std::copy_n(flight.num_chosen_N, N, call.selected_BN + flight.block * N);
}

void SparseFfn::take_mask(const Call& call, const Flight& flight) const {
  for (int64_t n = 0; n < call.num_tokens; ++n) {
    const uint8_t* mask = call.selection.mask_NF + n * num_neurons() + begin_of(flight.block);
    int32_t* chosen = flight.chosen + n * block_size_;
    int64_t num_chosen = 0;
    for (int64_t i = 0; i < count_of(flight.block); ++i) {
      chosen[num_chosen] = static_cast<int32_t>(i);
      num_chosen += mask[i] != 0;
    }
    flight.num_chosen_N[n] = num_chosen;
  }
}

void SparseFfn::unite(const Call& call, const Flight& flight) const {
  bool is_chosen[kLargeBlock] = {};
  for (int64_t n = 0; n < call.num_tokens; ++n) {
    const int32_t* chosen = flight.chosen + n * block_size_;
    for (int64_t i = 0; i < flight.num_chosen_N[n]; ++i) is_chosen[chosen[i]] = true;
  }
  *flight.num_united = 0;
  for (int64_t i = 0; i < count_of(flight.block); ++i) {
    flight.united[*flight.num_united] = static_cast<int32_t>(i);
    *flight.num_united += is_chosen[i];
  }
}

void SparseFfn::add_chosen(const Call& call, const Flight& flight, const Rows& rows,
                           ReadingOrder& order) const {
  if (call.unites_rows) return order.add(rows, flight.united, *flight.num_united);
  for (int64_t n = 0; n < call.num_tokens; ++n) {
    order.add(rows, flight.chosen + n * block_size_, flight.num_chosen_N[n]);
  }
}

void SparseFfn::add_gates(const Call& call, const Flight& flight, ReadingOrder& order) const {
  const Rows gate = block_of(gate_FD_, flight.block);
  if (call.mode == Mode::exact) {
    order.add(gate, flight.chosen, count_of(flight.block));
  } else {
    add_chosen(call, flight, gate, order);
  }
}

void SparseFfn::add_fired(const Call& call, const Flight& flight, ReadingOrder& order) const {
  add_chosen(call, flight, block_of(up_FD_, flight.block), order);
  const Rows down = block_of(down_FD_, flight.block);
  for (int64_t n = 0; n < call.num_tokens; ++n) {
    order.add(down, flight.chosen + n * block_size_, flight.num_chosen_N[n]);
  }
}

// product[n, i]: chosen row i of token n times the token.
void SparseFfn::multiply_chosen(const Call& call, const Flight& flight, const Rows& matrix,
                                ReadingOrder& order, float* product) const {
  const Kernels& k = kernels();
  const int64_t N = call.num_tokens;
  if (!call.unites_rows) {
    for (int64_t n = 0; n < N; ++n) {
      const int64_t first = n * block_size_;
      const Rows rows = order.take(matrix, flight.chosen + first, flight.num_chosen_N[n]);
      k.dot_rows(rows, call.x.from(n), 1, product + first, 0, false);
    }
    return;
  }
  float* all_NU = scratch<ProductTag>(N * block_size_);
  const Rows rows = order.take(matrix, flight.united, *flight.num_united);
  k.dot_rows(rows, call.x, N, all_NU, block_size_, false);
  int64_t place[kLargeBlock];
  for (int64_t u = 0; u < *flight.num_united; ++u) place[flight.united[u]] = u;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t first = n * block_size_;
    for (int64_t i = 0; i < flight.num_chosen_N[n]; ++i) {
      product[first + i] = all_NU[first + place[flight.chosen[first + i]]];
    }
  }
}

// Gates of the chosen neurons; keeps those that fire.
void SparseFfn::compute_gates(const Call& call, const Flight& flight, ReadingOrder& order) const {
  const int64_t N = call.num_tokens;
  const Rows gate = block_of(gate_FD_, flight.block);
  if (call.mode == Mode::exact) {
    const Rows rows = order.take(gate, flight.chosen, count_of(flight.block));
    kernels().dot_rows(rows, call.x, N, flight.gates, block_size_, false);
  } else {
    multiply_chosen(call, flight, gate, order, flight.gates);
  }
  for (int64_t n = 0; n < N; ++n) {
    float* gates = flight.gates + n * block_size_;
    int32_t* chosen = flight.chosen + n * block_size_;
    int64_t num_fired = 0;
    for (int64_t i = 0; i < flight.num_chosen_N[n]; ++i) {
      gates[num_fired] = fatrelu(gates[i]);
      chosen[num_fired] = chosen[i];
      num_fired += gates[num_fired] != 0.0f;
    }
    flight.num_chosen_N[n] = num_fired;
  }
  if (call.unites_rows) unite(call, flight);
}

// Up and down of the neurons that are left, into the part's sums.
void SparseFfn::fire(const Call& call, const Flight& flight, ReadingOrder& order) {
  const int64_t block = flight.block, N = call.num_tokens;
  const Rows down = block_of(down_FD_, block);
  float* h_N = scratch<UpTag>(N * block_size_);
  multiply_chosen(call, flight, block_of(up_FD_, block), order, h_N);
  bool fires[kLargeBlock] = {};
  for (int64_t n = 0; n < N; ++n) {
    const float* gates = flight.gates + n * block_size_;
    int32_t* fired = flight.chosen + n * block_size_;
    float* h = h_N + n * block_size_;
    int64_t num_active = 0;
    for (int64_t i = 0; i < flight.num_chosen_N[n]; ++i) {
      h[num_active] = gates[i] * h[i];
      fired[num_active] = fired[i];
      num_active += h[num_active] != 0.0f;
    }
    kernels().add_rows(order.take(down, fired, num_active), h, 0, 1,
                       flight.partial_ND + n * width_of_sums_, 0);
    call.active_BN[block * N + n] = num_active;
    for (int64_t i = 0; i < num_active; ++i) fires[fired[i]] = true;
    if (counter_F_) {
      for (int64_t i = 0; i < num_active; ++i) counter_F_[begin_of(block) + fired[i]] += 1;
    }
  }
  call.united_B[block] = std::count(fires, fires + count_of(block), true);
}

namespace {

void add(const float* x, int64_t size, float* sum) {
  constexpr float kOne = 1.0f;
  kernels().add_rows({x, DType::f32, 0, size, 1}, &kOne, 0, 1, sum, 0);
}

// Adds up the parts' sums in a tree: part i and i + 1, these sums two by two, and so on. Each is added
// by the thread that comes last with its share, so the tree, and every bit, is always the same, and
// most sums never leave the core that made them. True for the thread that has the whole, in part 0.
bool join(int64_t part, int64_t num_parts, int64_t size, float* partial_PS,
          std::atomic<int>* num_arrived_P) {
  for (int64_t apart = 1; apart < num_parts; apart *= 2) {
    const int64_t left = part / (2 * apart) * (2 * apart), right = left + apart;
    if (right >= num_parts) continue;
    if (num_arrived_P[right].fetch_add(1, std::memory_order_acq_rel) == 0) return false;
    add(partial_PS + right * size, size, partial_PS + left * size);
  }
  return true;
}

}  // namespace

void SparseFfn::forward(const float* x_ND, int64_t num_tokens, Mode mode, int64_t always_hot,
                        float* y_ND, bool accumulate) {
  run(x_ND, num_tokens, mode, {nullptr, nullptr, always_hot}, y_ND, accumulate);
}

void SparseFfn::forward_selected(const float* x_ND, int64_t num_tokens, const uint8_t* mask_NF,
                                 float* y_ND) {
  run(x_ND, num_tokens, Mode::predicted, {nullptr, mask_NF, 0}, y_ND, false);
}

void SparseFfn::run(const float* x_ND, int64_t num_tokens, Mode mode, Selection selection,
                    float* y_ND, bool accumulate) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t N = num_tokens, D = width(), B = num_blocks(), P = num_parts();
  counts_.selected_N.assign(N, 0);
  counts_.active_N.assign(N, 0);
  if (N == 0) return;

  if (activation_.is_silu && mode != Mode::dense) {
    throw std::invalid_argument("SiLU is never zero: an FFN with it runs in mode 'dense' only.");
  }
  const auto start = std::chrono::steady_clock::now();
  const uint64_t first_tick = ticks_now();
  const Vectors x = vectors(x_ND, N);
  if (mode == Mode::predicted && !selection.mask_NF) selection.inputs = predictor().prepare(x, N);
  const uint64_t prepare_ticks = ticks_now() - first_tick;
  const int64_t size = N * width_of_sums_;
  float* partial_PND = scratch<PartialTag>(P * size);
  int64_t* counts_2BN = scratch<CountTag, int64_t>(2 * B * N);
  const Call call = {x,          N,           mode,       x.tiles != nullptr,
                     selection,  partial_PND, counts_2BN, counts_2BN + B * N,
                     scratch<UnitedCountTag, int64_t>(B)};
  StageTicks* ticks_P = scratch<TicksTag, StageTicks>(P);
  std::atomic<int>* num_arrived_P = scratch<CountTag, std::atomic<int>>(P);
  for (int64_t part = 0; part < P; ++part) num_arrived_P[part].store(0, std::memory_order_relaxed);
  parallel_for(P, [&](int64_t part) {
    const int64_t begin = B * part / P, end = B * (part + 1) / P;
    float* partial_ND = partial_PND + part * size;
    StageTimer timer(ticks_P[part]);
    std::fill_n(partial_ND, size, 0.0f);
    if (mode == Mode::dense) {
      for (int64_t block = begin; block < end; ++block) dense_block(call, block, partial_ND, timer);
    } else {
      sparse_blocks(call, begin, end, partial_ND, timer);
    }
    if (join(part, P, size, partial_PND, num_arrived_P)) {
      for (int64_t n = 0; n < N; ++n) {
        float* sum = partial_PND + n * width_of_sums_;
        if (gate_FD_.dtype == DType::u4) kernels().add_least(sum, D);
        if (accumulate) {
          add(sum, D, y_ND + n * D);
        } else {
          std::copy_n(sum, D, y_ND + n * D);
        }
      }
    }
    timer.lap(kUpDown);
  });

  count(call);
  // While the inputs are prepared, the other threads take part or can do nothing else.
  const int T = num_threads();
  StageTicks busy = {{prepare_ticks * T}};
  for (int64_t part = 0; part < P; ++part) {
    for (int stage = 0; stage < kNumStages; ++stage) busy.of[stage] += ticks_P[part].of[stage];
  }
  usage_.add_times(std::chrono::steady_clock::now() - start, ticks_now() - first_tick, T, busy);
}

void SparseFfn::count(const Call& call) {
  const int64_t N = call.num_tokens, B = num_blocks();
  FfnUsage::Counts& sum = usage_.counts[{call.mode, N}];
  sum.calls += 1;
  for (int64_t i = 0; i < B * N; ++i) {
    counts_.selected_N[i % N] += call.selected_BN[i];
    counts_.active_N[i % N] += call.active_BN[i];
    sum.selected += call.selected_BN[i];
    sum.active += call.active_BN[i];
  }
  sum.united += std::accumulate(call.united_B, call.united_B + B, int64_t{0});
}

void SparseFfn::forward_residual(float* x_ND, int64_t num_tokens, const Norm& norm, Mode mode,
                                 int64_t always_hot) {
  float* normed_ND = scratch<NormedTag>(num_tokens * width());
  rms_norm(x_ND, num_tokens, width(), norm, normed_ND);
  forward(normed_ND, num_tokens, mode, always_hot, x_ND, true);
}

void SparseFfn::activations(const float* x_ND, int64_t num_tokens, float* h_NF) {
  const Vectors x = vectors(x_ND, num_tokens);
  parallel_for(num_blocks(), [&](int64_t block) {
    activations_of(block, x, num_tokens, h_NF + begin_of(block), num_neurons());
  });
}

void SparseFfn::scores(const float* x_ND, int64_t num_tokens, float* score_NF) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Predictor::Inputs* inputs = predictor().prepare(vectors(x_ND, num_tokens), num_tokens);
  parallel_for(num_blocks(), [&](int64_t block) {
    predictor_->scores(block, inputs, num_tokens, score_NF + begin_of(block), num_neurons());
  });
}

void SparseFfn::select(const float* x_ND, int64_t num_tokens, int64_t always_hot,
                       uint8_t* mask_NF) {
  std::lock_guard<std::mutex> lock(mutex_);
  const Predictor::Inputs* inputs = predictor().prepare(vectors(x_ND, num_tokens), num_tokens);
  std::fill_n(mask_NF, num_tokens * num_neurons(), uint8_t{0});
  parallel_for(num_blocks(), [&](int64_t block) {
    int32_t* selected = scratch<ChosenTag, int32_t>(num_tokens * block_size_);
    int64_t* num_selected = scratch<ChosenTag, int64_t>(num_tokens);
    predictor_->select(block, inputs, num_tokens, num_hot_in(block, always_hot), selected,
                       num_selected);
    for (int64_t n = 0; n < num_tokens; ++n) {
      uint8_t* mask = mask_NF + n * num_neurons() + begin_of(block);
      for (int64_t i = 0; i < num_selected[n]; ++i) mask[selected[n * block_size_ + i]] = 1;
    }
  });
}

SparseFfn::Counts SparseFfn::last_counts() {
  std::lock_guard<std::mutex> lock(mutex_);
  return counts_;
}

FfnUsage SparseFfn::take_usage() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(usage_, {});
}

}  // namespace hotneuron

// The module _cpu_ext: checks arguments, releases the GIL, calls the C++ core.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "decode_layers.h"
#include "dispatch.h"
#include "gate_predictors.h"
#include "linear.h"
#include "mlp_predictor.h"
#include "quantize.h"
#include "sparse_ffn.h"
#include "tensor_arg.h"
#include "thread_pool.h"

namespace hotneuron {
namespace {

using namespace nb::literals;
using Release = nb::gil_scoped_release;

Matrix float_matrix(nb::handle tensor, const char* name, int64_t num_rows, int64_t num_columns) {
  const TensorArg arg(tensor, name, Layout::rows_apart);
  arg.of({Element::f32, Element::bf16}).shaped({num_rows, num_columns});
  return {arg.data<void>(), arg.dtype(), arg.size(0), arg.size(1),
          bytes_of(arg.dtype(), arg.row_stride())};
}

// Of a float tensor, or weights in 8 or 4 bits.
Matrix matrix(nb::handle weights, const char* name, int64_t num_rows, int64_t num_columns) {
  const Matrix* grouped = nullptr;
  if (!nb::try_cast(weights, grouped)) return float_matrix(weights, name, num_rows, num_columns);
  if ((num_rows >= 0 && grouped->num_rows != num_rows) ||
      (num_columns >= 0 && grouped->num_columns != num_columns)) {
    throw nb::value_error((std::string(name) + " has another shape than is wanted.").c_str());
  }
  return *grouped;
}

DType grouped_dtype(int bits, int64_t num_columns) {
  if (bits != 8 && bits != 4) throw nb::value_error("Weights have 8 or 4 bits.");
  if (num_columns <= 0 || num_columns % kGroup != 0) {
    throw nb::value_error("Weights in 8 or 4 bits need a width in groups of 32 columns.");
  }
  return bits == 8 ? DType::q8 : DType::u4;
}

Norm norm(nb::handle weight_D, float eps, int64_t width) {
  const TensorArg arg(weight_D, "norm weight");
  arg.of({Element::f32, Element::bf16}).shaped({width});
  return {arg.data<void>(), arg.dtype(), eps};
}

// fp32 [N, width]; width -1 takes any.
TensorArg activations(nb::handle tensor, const char* name, int64_t num_tokens, int64_t width) {
  TensorArg arg(tensor, name);
  arg.of({Element::f32}).shaped({num_tokens, width});
  return arg;
}

const float* vector_f32(nb::handle tensor, const char* name, int64_t size) {
  return TensorArg(tensor, name).of({Element::f32}).shaped({size}).data<float>();
}

Strips strips(nb::handle data_SB, const char* data_name, nb::handle scale_SH,
              const char* scale_name, int64_t num_rows, int64_t num_groups) {
  Strips made = {nullptr, nullptr, num_rows, num_groups};
  const TensorArg data(data_SB, data_name), scale(scale_SH, scale_name);
  data.of({Element::u8}).shaped({made.num_strips(), num_groups * kStripGroupBytes});
  scale.of({Element::f16}).shaped({made.num_strips(), num_groups * kStripRows});
  made.data = data.data<uint8_t>();
  made.scale = scale.data<void>();
  return made;
}

Rope rope(nb::handle cos_SK, nb::handle sin_SK, int64_t head_dim, int64_t min_positions) {
  const TensorArg cos(cos_SK, "cos_SK"), sin(sin_SK, "sin_SK");
  cos.of({Element::f32}).shaped({-1, head_dim / 2});
  sin.of({Element::f32}).shaped({cos.size(0), head_dim / 2});
  if (cos.size(0) < min_positions) {
    throw nb::value_error("A token's position is beyond the rotary tables.");
  }
  return {cos.data<float>(), sin.data<float>()};
}

int64_t last_position(const KvBatch& kv) {
  int64_t last = -1;
  for (const KvBatch::Token& token : kv.tokens) last = std::max(last, token.position);
  return last;
}

void check_layer(const KvBatch& kv, int64_t layer) {
  if (layer < 0 || (layer >= kv.num_layers && !kv.tokens.empty())) {
    throw nb::value_error("layer is out of range of the KV pool.");
  }
}

// Appends one table's blocks up to that of `position`, each checked against the pool.
void add_blocks(KvBatch& kv, const TensorArg& table, int64_t num_blocks, int64_t position) {
  const int64_t last = position / kv.block_size;
  if (position < 0 || last >= table.size(0)) {
    throw nb::value_error(("Position " + std::to_string(position) + " is outside a table of " +
                           std::to_string(table.size(0)) + " blocks.")
                              .c_str());
  }
  for (int64_t i = 0; i <= last; ++i) {
    const int64_t block = table.data<int64_t>()[i];
    if (block < 0 || block >= num_blocks) {
      throw nb::value_error(("There is no block " + std::to_string(block) + " in a pool of " +
                             std::to_string(num_blocks) + ".")
                                .c_str());
    }
    kv.blocks.push_back(block);
  }
}

KvBatch kv_batch(const std::vector<nb::object>& pools, const std::vector<nb::object>& tables,
                 const std::vector<int64_t>& positions) {
  if (pools.size() != positions.size() || tables.size() != positions.size()) {
    throw nb::value_error("KvBatch needs one pool, one table and one position per token.");
  }
  KvBatch kv{{}, {}, DType::f32, 0, 0, 1, 0};
  for (size_t n = 0; n < pools.size(); ++n) {
    const TensorArg pool(pools[n], "KV pool"), table(tables[n], "block table");
    if (n == 0) {
      pool.of({Element::f32, Element::bf16}).shaped({-1, -1, 2, -1, -1, -1});
      kv = {{}, {}, pool.dtype(), pool.size(1), pool.size(3), pool.size(4), pool.size(5)};
    }
    pool.of({kv.dtype == DType::f32 ? Element::f32 : Element::bf16})
        .shaped({-1, kv.num_layers, 2, kv.num_kv_heads, kv.block_size, kv.head_dim});
    table.of({Element::i64}).shaped({-1});
    kv.tokens.push_back(
        {pool.data<char>(), static_cast<int64_t>(kv.blocks.size()), positions[n]});
    add_blocks(kv, table, pool.size(0), positions[n]);
  }
  return kv;
}

void bind_quantize(nb::module_& m) {
  nb::class_<Matrix>(m, "GroupedMatrix")
      .def("__init__", [](Matrix* self, nb::handle rows_OB, int bits, int64_t num_columns) {
        const DType dtype = grouped_dtype(bits, num_columns);
        const TensorArg rows(rows_OB, "rows_OB", Layout::rows_apart);
        rows.of({Element::u8}).shaped({-1, grouped_row_bytes(dtype, num_columns)});
        new (self) Matrix(grouped_matrix(rows.data<void>(), dtype, rows.size(0), num_columns,
                                         rows.row_stride()));
      });
  m.def("grouped_row_bytes", [](int bits, int64_t num_columns) {
    return grouped_row_bytes(grouped_dtype(bits, num_columns), num_columns);
  });
  m.def("quantize", [](nb::handle w_OD, int bits, nb::handle rows_OB) {
    const Matrix w = float_matrix(w_OD, "w_OD", -1, -1);
    const DType dtype = grouped_dtype(bits, w.num_columns);
    const TensorArg rows(rows_OB, "rows_OB");
    rows.of({Element::u8}).shaped({w.num_rows, grouped_row_bytes(dtype, w.num_columns)});
    Release release;
    quantize(w, dtype, rows.data<void>());
  });
  m.def("dequantize", [](const Matrix& grouped, int64_t begin, nb::handle out_OD) {
    const TensorArg out(out_OD, "out");
    out.of({Element::f32, Element::bf16}).shaped({-1, grouped.num_columns});
    if (begin < 0 || begin + out.size(0) > grouped.num_rows) {
      throw nb::value_error("The rows to dequantize are out of range.");
    }
    Release release;
    dequantize(grouped, begin, out.size(0), out.dtype(), out.data<void>());
  });
}

void bind_linear(nb::module_& m) {
  m.def("linear", [](nb::handle x_ND, nb::handle w_OD, nb::handle out_NO) {
    const Matrix w = matrix(w_OD, "w_OD", -1, -1);
    const TensorArg x = activations(x_ND, "x_ND", -1, w.num_columns);
    const TensorArg out = activations(out_NO, "out", x.size(0), w.num_rows);
    Release release;
    linear(x.data<float>(), x.size(0), w, out.data<float>(), false);
  });
  m.def("rms_norm", [](nb::handle x_ND, nb::handle weight_D, float eps, nb::handle out_ND) {
    const TensorArg x = activations(x_ND, "x_ND", -1, -1);
    const Norm n = norm(weight_D, eps, x.size(1));
    const TensorArg out = activations(out_ND, "out", x.size(0), x.size(1));
    Release release;
    rms_norm(x.data<float>(), x.size(0), x.size(1), n, out.data<float>());
  });
  m.def("norm_linear",
        [](nb::handle x_ND, nb::handle norm_D, float eps, nb::handle w_OD, nb::handle out_NO) {
          const Matrix w = matrix(w_OD, "w_OD", -1, -1);
          const TensorArg x = activations(x_ND, "x_ND", -1, w.num_columns);
          const Norm n = norm(norm_D, eps, w.num_columns);
          const TensorArg out = activations(out_NO, "out", x.size(0), w.num_rows);
          Release release;
          norm_linear(x.data<float>(), x.size(0), n, w, out.data<float>());
        });
}

struct PyAttention {
  AttentionBlock block;
  int64_t num_kv_heads, head_dim, num_positions;

  void check(const KvBatch& kv) const {
    check_layer(kv, block.layer);
    if (kv.num_kv_heads != num_kv_heads || kv.head_dim != head_dim) {
      throw nb::value_error("The KV pool has other heads than this attention.");
    }
    if (last_position(kv) >= num_positions) {
      throw nb::value_error("A token's position is beyond the rotary tables.");
    }
  }
};

void bind_attention(nb::module_& m) {
  nb::class_<KvBatch>(m, "KvBatch")
      .def("__init__", [](KvBatch* self, const std::vector<nb::object>& pools,
                          const std::vector<nb::object>& tables,
                          const std::vector<int64_t>& positions) {
        new (self) KvBatch(kv_batch(pools, tables, positions));
      });

  m.def("attention", [](nb::handle qkv_NC, const KvBatch& kv, int64_t layer, nb::handle cos_SK,
                        nb::handle sin_SK, int64_t num_heads, nb::handle out_NC) {
    const int64_t N = static_cast<int64_t>(kv.tokens.size());
    if (N == 0) return;
    check_layer(kv, layer);
    if (num_heads <= 0 || num_heads % kv.num_kv_heads != 0) {
      throw nb::value_error("num_heads must be a positive multiple of the pool's kv heads.");
    }
    const Rope tables = rope(cos_SK, sin_SK, kv.head_dim, last_position(kv) + 1);
    const int64_t width = (num_heads + 2 * kv.num_kv_heads) * kv.head_dim;
    const TensorArg qkv = activations(qkv_NC, "qkv_NC", N, width);
    const TensorArg out = activations(out_NC, "out", N, num_heads * kv.head_dim);
    Release release;
    attention(qkv.data<float>(), kv, layer, tables, num_heads, out.data<float>());
  });

  nb::class_<PyAttention>(m, "Attention")
      .def("__init__",
           [](PyAttention* self, int64_t layer, nb::handle norm_D, nb::handle qkv_CD,
              nb::handle o_DC, nb::handle cos_SK, nb::handle sin_SK, int64_t num_heads,
              int64_t num_kv_heads, float eps) {
             if (num_kv_heads <= 0 || num_heads <= 0 || num_heads % num_kv_heads != 0) {
               throw nb::value_error("num_heads must be a positive multiple of num_kv_heads.");
             }
             const Matrix qkv = matrix(qkv_CD, "qkv_CD", -1, -1);
             const int64_t K = qkv.num_rows / (num_heads + 2 * num_kv_heads);
             if (K % 2 != 0 || qkv.num_rows != K * (num_heads + 2 * num_kv_heads)) {
               throw nb::value_error("qkv_CD must have (H + 2 G) K rows, K even.");
             }
             const Matrix o = matrix(o_DC, "o_DC", qkv.num_columns, num_heads * K);
             const Norm n = norm(norm_D, eps, qkv.num_columns);
             const Rope tables = rope(cos_SK, sin_SK, K, 0);
             const int64_t num_positions = TensorArg(cos_SK, "cos_SK").size(0);
             new (self)
                 PyAttention{{layer, num_heads, n, qkv, o, tables}, num_kv_heads, K, num_positions};
           })
      .def("forward", [](const PyAttention& self, nb::handle x_ND, const KvBatch& kv) {
        const int64_t N = static_cast<int64_t>(kv.tokens.size());
        const TensorArg x = activations(x_ND, "x_ND", N, self.block.qkv_CD.num_columns);
        if (N == 0) return;
        self.check(kv);
        Release release;
        self.block.forward(x.data<float>(), kv);
      });
}

void check_always_hot(const SparseFfn& ffn, int64_t always_hot) {
  if (always_hot < 0 || always_hot > ffn.num_neurons()) {
    throw nb::value_error("always_hot must be between 0 and the number of neurons.");
  }
}

void bind_sparse_ffn(nb::module_& m) {
  nb::class_<SparseFfn>(m, "SparseFfn")
      .def("__init__",
           [](SparseFfn* self, nb::handle gate_FD, nb::handle up_FD, nb::handle down_FD,
              bool is_silu, float threshold) {
             const Matrix gate = matrix(gate_FD, "gate_FD", -1, -1);
             const Matrix up = matrix(up_FD, "up_FD", gate.num_rows, gate.num_columns);
             const Matrix down = matrix(down_FD, "down_FD", gate.num_rows, gate.num_columns);
             if (up.dtype != gate.dtype || down.dtype != gate.dtype) {
               throw nb::value_error("gate_FD, up_FD and down_FD must have one dtype.");
             }
             new (self) SparseFfn(gate, up, down, {is_silu, threshold});
           })
      .def("block_size", &SparseFfn::block_size)
      .def("set_mlp_predictor",
           [](SparseFfn& self, nb::handle fc1_q_RD, nb::handle fc1_scale_R, nb::handle bias_R,
              nb::handle fc2_q_BRS, nb::handle fc2_scale_F, nb::handle bias_F, float threshold) {
             const TensorArg fc1(fc1_q_RD, "fc1_q_RD"), fc2(fc2_q_BRS, "fc2_q_BRS");
             fc1.of({Element::i8}).shaped({-1, self.width()});
             const int64_t R = fc1.size(0), F = self.num_neurons(), S = self.block_size();
             fc2.of({Element::i8}).shaped({(F + S - 1) / S, R, S});
             if (R == 0) throw nb::value_error("The predictor's rank must be at least 1.");
             const MlpWeights weights = {plain_matrix(fc1.data<void>(), DType::i8, R, self.width()),
                                         vector_f32(fc1_scale_R, "fc1_scale_R", R),
                                         vector_f32(bias_R, "bias_R", R),
                                         fc2.data<int8_t>(),
                                         vector_f32(fc2_scale_F, "fc2_scale_F", F),
                                         vector_f32(bias_F, "bias_F", F)};
             self.set_predictor(
                 std::make_unique<MlpPredictor>(weights, F, S, threshold));
           })
      .def("set_int4_mlp_predictor",
           [](SparseFfn& self, nb::handle fc1_SB, nb::handle fc1_scale_SH, nb::handle bias_R,
              nb::handle fc2_SB, nb::handle fc2_scale_SH, nb::handle bias_F, float threshold) {
             const TensorArg bias(bias_R, "bias_R");
             bias.of({Element::f32}).shaped({-1});
             const int64_t R = bias.size(0), F = self.num_neurons();
             if (self.width() % kGroup != 0 || R == 0 || R % kGroup != 0) {
               throw nb::value_error(
                   "A predictor in 4 bits needs a width and a rank in groups of 32 columns.");
             }
             const Int4MlpWeights weights = {
                 strips(fc1_SB, "fc1_SB", fc1_scale_SH, "fc1_scale_SH", R, self.width() / kGroup),
                 bias.data<float>(),
                 strips(fc2_SB, "fc2_SB", fc2_scale_SH, "fc2_scale_SH", F, R / kGroup),
                 vector_f32(bias_F, "bias_F", F)};
             self.set_predictor(
                 std::make_unique<Int4MlpPredictor>(weights, self.block_size(), threshold));
           })
      .def("set_gate_predictor",
           [](SparseFfn& self, nb::handle copy_FD, nb::handle scale_FC, float threshold) {
             const int64_t F = self.num_neurons(), C = self.width() / kGroup;
             if (self.width() % kGroup != 0) {
               throw nb::value_error("A copy of the gate needs a width in groups of 32 columns.");
             }
             const TensorArg copy(copy_FD, "copy_FD"), scale(scale_FC, "scale_FC");
             scale.of({Element::f16}).shaped({F, C});
             copy.of({Element::i8}).shaped({F, self.width()});
             const Matrix matrix = {copy.data<void>(), DType::q8, F, self.width(), self.width(),
                                    scale.data<void>(), C * int64_t{sizeof(uint16_t)}};
             self.set_predictor(
                 std::make_unique<GatePredictor>(matrix, self.block_size(), threshold));
           })
      .def("set_gate_strips_predictor",
           [](SparseFfn& self, nb::handle strips_SB, nb::handle scale_SH, int64_t num_rows,
              float threshold) {
             const int64_t F = self.num_neurons(), C = self.width() / kGroup;
             if (num_rows != F) {
               throw nb::value_error(("The predictor scores " + std::to_string(num_rows) +
                                      " neurons; the FFN has " + std::to_string(F) + ".")
                                         .c_str());
             }
             if (self.width() % kGroup != 0) {
               throw nb::value_error("A copy of the gate needs a width in groups of 32 columns.");
             }
             const Strips copy = strips(strips_SB, "strips_SB", scale_SH, "scale_SH", F, C);
             self.set_predictor(
                 std::make_unique<GateStripsPredictor>(copy, self.block_size(), threshold));
           })
      .def("set_sign_predictor",
           [](SparseFfn& self, nb::handle bits_FB, float threshold) {
             const int64_t F = self.num_neurons(), row_bytes = self.width() / 8;
             if (self.width() % 8 != 0) {
               throw nb::value_error("Signs of the gate need a width in bytes of 8 columns.");
             }
             const TensorArg bits(bits_FB, "bits_FB");
             bits.of({Element::u8}).shaped({F, row_bytes});
             self.set_predictor(std::make_unique<SignPredictor>(
                 bits.data<uint8_t>(), row_bytes, F, self.block_size(), threshold));
           })
      .def("set_predictor_threshold",
           [](SparseFfn& self, float threshold) {
             Release release;
             self.set_predictor_threshold(threshold);
           })
      .def(
          "set_counter",
          [](SparseFfn& self, nb::handle counter_F) {
            int64_t* counter = nullptr;
            if (!counter_F.is_none()) {
              const TensorArg arg(counter_F, "counter_F");
              counter = arg.of({Element::i64}).shaped({self.num_neurons()}).data<int64_t>();
            }
            Release release;
            self.set_counter(counter);
          },
          nb::arg().none())
      .def("forward",
           [](SparseFfn& self, nb::handle x_ND, const std::string& mode, int64_t always_hot,
              nb::handle out_ND) {
             const TensorArg x = activations(x_ND, "x_ND", -1, self.width());
             const TensorArg out = activations(out_ND, "out", x.size(0), self.width());
             const Mode m = mode_from(mode);
             check_always_hot(self, always_hot);
             Release release;
             self.forward(x.data<float>(), x.size(0), m, always_hot, out.data<float>(), false);
           })
      .def("forward_selected",
           [](SparseFfn& self, nb::handle x_ND, nb::handle mask_NF, nb::handle out_ND) {
             const TensorArg x = activations(x_ND, "x_ND", -1, self.width());
             const TensorArg mask(mask_NF, "mask_NF");
             mask.of({Element::boolean}).shaped({x.size(0), self.num_neurons()});
             const TensorArg out = activations(out_ND, "out", x.size(0), self.width());
             Release release;
             self.forward_selected(x.data<float>(), x.size(0), mask.data<uint8_t>(),
                                   out.data<float>());
           })
      .def("forward_residual",
           [](SparseFfn& self, nb::handle x_ND, nb::handle norm_D, float eps,
              const std::string& mode, int64_t always_hot) {
             const TensorArg x = activations(x_ND, "x_ND", -1, self.width());
             const Norm n = norm(norm_D, eps, self.width());
             const Mode m = mode_from(mode);
             check_always_hot(self, always_hot);
             Release release;
             self.forward_residual(x.data<float>(), x.size(0), n, m, always_hot);
           })
      .def("activations",
           [](SparseFfn& self, nb::handle x_ND, nb::handle h_NF) {
             const TensorArg x = activations(x_ND, "x_ND", -1, self.width());
             const TensorArg h = activations(h_NF, "h_NF", x.size(0), self.num_neurons());
             Release release;
             self.activations(x.data<float>(), x.size(0), h.data<float>());
           })
      .def("scores",
           [](SparseFfn& self, nb::handle x_ND, nb::handle score_NF) {
             const TensorArg x = activations(x_ND, "x_ND", -1, self.width());
             const TensorArg score =
                 activations(score_NF, "score_NF", x.size(0), self.num_neurons());
             Release release;
             self.scores(x.data<float>(), x.size(0), score.data<float>());
           })
      .def("select",
           [](SparseFfn& self, nb::handle x_ND, int64_t always_hot, nb::handle mask_NF) {
             const TensorArg x = activations(x_ND, "x_ND", -1, self.width());
             const TensorArg mask(mask_NF, "mask_NF");
             check_always_hot(self, always_hot);
             mask.of({Element::boolean}).shaped({x.size(0), self.num_neurons()});
             Release release;
             self.select(x.data<float>(), x.size(0), always_hot, mask.data<uint8_t>());
           })
      .def(
          "last_counts",
          [](SparseFfn& self) {
            const SparseFfn::Counts counts = [&] {
              Release release;
              return self.last_counts();
            }();
            return nb::make_tuple(nb::cast(counts.selected_N), nb::cast(counts.active_N));
          },
          nb::sig("def last_counts(self) -> tuple[list[int], list[int]]"))
      .def(
          "take_usage",
          [](SparseFfn& self) {
            const FfnUsage usage = [&] {
              Release release;
              return self.take_usage();
            }();
            nb::list counts;
            for (const auto& [key, sum] : usage.counts) {
              counts.append(nb::make_tuple(name_of(key.first), key.second, sum.calls, sum.selected,
                                           sum.active, sum.united));
            }
            return nb::make_tuple(counts, usage.seconds[kSelect], usage.seconds[kGate],
                                  usage.seconds[kUpDown], usage.wait_seconds);
          },
          nb::sig("def take_usage(self) -> tuple[list[tuple[str, int, int, int, int, int]], float, "
                  "float, float, float]"));
}

struct PyDecodeLayers {
  std::vector<DecodeLayer> layers;
  std::vector<const PyAttention*> attentions;
  int64_t width;
};

std::vector<ModeRun> mode_runs(const std::vector<std::tuple<int64_t, int64_t, std::string>>& runs,
                               int64_t num_tokens) {
  std::vector<ModeRun> result;
  int64_t end = 0;
  for (const auto& [begin, run_end, mode] : runs) {
    if (begin != end || run_end < begin) break;
    end = run_end;
    result.push_back({begin, run_end, mode_from(mode)});
  }
  if (end != num_tokens || result.size() != runs.size()) {
    throw nb::value_error("The runs of modes must cover all tokens, one behind the other.");
  }
  return result;
}

void bind_decode_layers(nb::module_& m) {
  nb::class_<PyDecodeLayers>(m, "DecodeLayers")
      .def("__init__",
           [](PyDecodeLayers* self, const nb::list& attentions, const nb::list& norms,
              const nb::list& ffns, float eps) {
             if (attentions.size() != ffns.size() || norms.size() != ffns.size() || !ffns.size()) {
               throw nb::value_error("DecodeLayers needs one attention, norm and FFN per layer.");
             }
             PyDecodeLayers made{{}, {}, 0};
             for (size_t l = 0; l < ffns.size(); ++l) {
               const auto* attention = nb::cast<const PyAttention*>(attentions[l]);
               auto* ffn = nb::cast<SparseFfn*>(ffns[l]);
               made.width = ffn->width();
               if (attention->block.qkv_CD.num_columns != made.width ||
                   (l > 0 && made.layers[0].ffn->width() != made.width)) {
                 throw nb::value_error("All layers must have one width.");
               }
               made.attentions.push_back(attention);
               made.layers.push_back({&attention->block, norm(norms[l], eps, made.width), ffn});
             }
             new (self) PyDecodeLayers(std::move(made));
           })
      .def("forward",
           [](const PyDecodeLayers& self, nb::handle x_ND, const KvBatch& kv,
              const std::vector<std::tuple<int64_t, int64_t, std::string>>& runs) {
             const int64_t N = static_cast<int64_t>(kv.tokens.size());
             const TensorArg x = activations(x_ND, "x_ND", N, self.width);
             const std::vector<ModeRun> modes = mode_runs(runs, N);
             if (N == 0) return nb::make_tuple(0.0, 0.0);
             for (const PyAttention* attention : self.attentions) attention->check(kv);
             const LayerSeconds seconds = [&] {
               Release release;
               return forward_layers(self.layers, x.data<float>(), self.width, kv, modes);
             }();
             return nb::make_tuple(seconds.attention, seconds.ffn);
           },
           nb::sig("def forward(self, x_ND: object, kv: KvBatch, runs: "
                   "list[tuple[int, int, str]]) -> tuple[float, float]"));
}

void set_threads(int count) {
  if (count < 0) throw nb::value_error("The number of threads must be positive.");
  Release release;
  set_num_threads(count);
}

}  // namespace
}  // namespace hotneuron

NB_MODULE(_cpu_ext, m) {
  using namespace hotneuron;
  m.def("num_threads", [] {
    Release release;
    return num_threads();
  });
  m.def("set_num_threads", &set_threads);
  m.def("set_spin_time", &set_spin_time);
  m.def("available_isas", &available_isas);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("force_isa", &force_isa);
  bind_quantize(m);
  bind_linear(m);
  bind_attention(m);
  bind_sparse_ffn(m);
  bind_decode_layers(m);
}

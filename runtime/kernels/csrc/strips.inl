// Products with rows in strips (kernels.h): the part of kernels.inl that is written once per
// instruction set is the sum over a group, `StripGroup`. Included there, inside its namespace.

// Every lane is a row: no sum needs adding up across a register. Groups ascend, so one token's sums
// are the same beside any others.
template <int kTokens>
inline void dot_strip(const uint8_t* data, const Half* scale, int64_t num_groups, bool asks_ahead,
                      const Vectors& x, float (*out)[hotneuron::kStripRows]) {
  constexpr int kRegs = hotneuron::kStripRows / kWidth;
  const int64_t groups_apart = x.ld / kGroup;
  Reg sum[kTokens][kRegs];
  UNROLL
  for (int k = 0; k < kTokens; ++k) {
    UNROLL
    for (int i = 0; i < kRegs; ++i) sum[k][i] = Vec::set1(0.0f);
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    if (asks_ahead) {
      const uint8_t* wanted = data + hotneuron::kBytesAhead;
      for (int64_t b = 0; b < hotneuron::kStripGroupBytes; b += kLineBytes) ask_for(wanted + b);
    }
    const StripGroup group(data);
    UNROLL
    for (int k = 0; k < kTokens; ++k) {
      Reg whole[kRegs];
      group.dot(x.q + k * x.ld + g * kGroup, x.total[k * groups_apart + g], whole);
      const Reg x_scale = Vec::set1(x.scale[k * groups_apart + g]);
      UNROLL
      for (int i = 0; i < kRegs; ++i) {
        const Reg scales = Vec::mul(Vec::load(scale + i * kWidth), x_scale);
        sum[k][i] = Vec::fma(whole[i], scales, sum[k][i]);
      }
    }
    data += hotneuron::kStripGroupBytes;
    scale += hotneuron::kStripRows;
  }
  UNROLL
  for (int k = 0; k < kTokens; ++k) {
    UNROLL
    for (int i = 0; i < kRegs; ++i) Vec::store(out[k] + i * kWidth, sum[k][i]);
  }
}

struct DotStrips {
  const Strips& strips;
  const Vectors& x;
  float* y;
  int64_t ldy;

  template <int kTokens>
  void run(int64_t t) const {
    const Vectors from = x.from(t);
    for (int64_t s = 0; s < strips.num_strips(); ++s) {
      float out[kTokens][hotneuron::kStripRows];
      dot_strip<kTokens>(strips.data_of(s), static_cast<const Half*>(strips.scales_of(s)),
                         strips.num_groups, t == 0, from, out);
      const int64_t first = s * hotneuron::kStripRows;
      const int64_t rows = smaller(strips.num_rows - first, hotneuron::kStripRows);
      for (int k = 0; k < kTokens; ++k) {
        __builtin_memcpy(y + (t + k) * ldy + first, out[k], rows * sizeof(float));
      }
    }
  }
};

void dot_strips(const Strips& strips, const Vectors& x, int64_t num_tokens, float* y, int64_t ldy) {
  for_token_tiles(DotStrips{strips, x, y, ldy}, num_tokens);
}

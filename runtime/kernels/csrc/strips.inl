// Products with rows in strips (kernels.h): the part of kernels.inl that is written once per
// instruction set is the sum over a group, `StripGroup`. Included there, inside its namespace.

// How far ahead of a strip's use its bytes are asked for. Short strips gain nothing from what the
// hardware reads along.
inline int64_t strip_distance(int64_t num_groups) {
  constexpr int64_t kLongStrip = 8192;
  return num_groups * hotneuron::kStripGroupBytes < kLongStrip ? hotneuron::kBytesAhead
                                                               : kStreamAhead;
}

// Every lane is a row: no sum needs adding up across a register. Groups ascend, so one token's sums
// are the same beside any others.
template <int kTokens>
inline void dot_strip(const uint8_t* data, const Half* scale, int64_t num_groups, bool asks_ahead,
                      const Vectors& x, float (*out)[hotneuron::kStripRows]) {
  constexpr int kRegs = hotneuron::kStripRows / kWidth;
  const int64_t groups_apart = x.ld / kGroup, distance = strip_distance(num_groups);
  Reg sum[kTokens][kRegs];
  UNROLL
  for (int k = 0; k < kTokens; ++k) {
    UNROLL
    for (int i = 0; i < kRegs; ++i) sum[k][i] = Vec::set1(0.0f);
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    if (asks_ahead) {
      const uint8_t* wanted = data + distance;
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

#ifdef HOTNEURON_TILES
// The whole numbers of a strip's group as AMX takes them: four columns of all sixteen rows a line.
INLINE void unpack_strip(const uint8_t* data, int8_t (*line)[64]) {
  const StripGroup group(data);
  const __m512i too_much = _mm512_set1_epi8(8);
  UNROLL
  for (int j = 0; j < 4; ++j) {
    _mm512_store_si512(line[j], _mm512_sub_epi8(group.low[j], too_much));
    _mm512_store_si512(line[4 + j], _mm512_sub_epi8(group.high[j], too_much));
  }
}

// A strip with up to sixteen tokens by AMX: the sums of dot_strip, in its order. Where there are
// fewer tokens, the tile's other rows are whatever stands behind them in `x.q`, which has twice the
// room of the tokens (linear.cpp); nothing is made of them.
inline void dot_strip_tile(const uint8_t* data, const Half* scale, int64_t num_groups,
                           bool asks_ahead, const Vectors& x, int64_t num_tokens,
                           float (*out)[hotneuron::kStripRows]) {
  alignas(64) int8_t line[kGroup / 4][64];
  alignas(64) int32_t whole[hotneuron::kTileTokens][hotneuron::kStripRows];
  const int64_t distance = strip_distance(num_groups);
  for (int64_t k = 0; k < num_tokens; ++k) Vec::store(out[k], Vec::set1(0.0f));
  for (int64_t g = 0; g < num_groups; ++g) {
    if (asks_ahead) {
      const uint8_t* wanted = data + distance;
      for (int64_t b = 0; b < hotneuron::kStripGroupBytes; b += kLineBytes) ask_for(wanted + b);
    }
    unpack_strip(data, line);
    _tile_zero(0);
    _tile_loadd(4, x.q + g * kGroup, x.ld);
    _tile_loadd(6, line, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, whole, 64);
    const Reg scales = Vec::load(scale);
    for (int64_t k = 0; k < num_tokens; ++k) {
      const Reg times = Vec::mul(scales, Vec::set1(x.scale[k * (x.ld / kGroup) + g]));
      const Reg sums = _mm512_cvtepi32_ps(_mm512_load_si512(whole[k]));
      Vec::store(out[k], Vec::fma(sums, times, Vec::load(out[k])));
    }
    data += hotneuron::kStripGroupBytes;
    scale += hotneuron::kStripRows;
  }
}

void dot_strip_tiles(const Strips& strips, const Vectors& x, int64_t num_tokens, float* y,
                     int64_t ldy) {
  const TileConfig config = tile_config();
  _tile_loadconfig(&config);
  for (int64_t s = 0; s < strips.num_strips(); ++s) {
    const int64_t first = s * hotneuron::kStripRows;
    const int64_t rows = smaller(strips.num_rows - first, hotneuron::kStripRows);
    for (int64_t t = 0; t < num_tokens; t += hotneuron::kTileTokens) {
      const int64_t count = smaller(num_tokens - t, hotneuron::kTileTokens);
      alignas(64) float out[hotneuron::kTileTokens][hotneuron::kStripRows];
      dot_strip_tile(strips.data_of(s), static_cast<const Half*>(strips.scales_of(s)),
                     strips.num_groups, t == 0, x.from(t), count, out);
      for (int64_t k = 0; k < count; ++k) {
        __builtin_memcpy(y + (t + k) * ldy + first, out[k], rows * sizeof(float));
      }
    }
  }
  _tile_release();
}
#endif

void dot_strips(const Strips& strips, const Vectors& x, int64_t num_tokens, float* y, int64_t ldy) {
#ifdef HOTNEURON_TILES
  if (x.tiles) return dot_strip_tiles(strips, x, num_tokens, y, ldy);
#endif
  for_token_tiles(DotStrips{strips, x, y, ldy}, num_tokens);
}

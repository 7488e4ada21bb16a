// Dot products of grouped rows: the part of kernels.inl that AVX-512 and AMX do in a way of their
// own (groups_avx512.h, groups_amx.h). Included there, inside its namespace.

constexpr int64_t kScales = 16;  // of a row that are widened at once

// body(g, load) for 0 <= g < count in steps of a register; load(p) reads what is left of count and
// fills up with zeros. What is written may be whole registers, up to kScales: a load cannot take its
// value from a masked store that is still under way.
template <class Body>
inline void for_lanes(int64_t count, const Body& body) {
  int64_t g = 0;
  for (; g + kWidth <= count; g += kWidth) body(g, [](auto* p) { return Vec::load(p); });
  const int64_t rest = count - g;
  if (rest > 0) body(g, [rest](auto* p) { return Vec::load(p, rest); });
}

#ifndef HOTNEURON_ROW_DOT
// out = the scales of a row's groups, times those of a vector.
inline void scale_products(const Half* row, const float* x, int64_t count, float* out) {
  for_lanes(count, [&](int64_t g, auto load) {
    Vec::store(out + g, Vec::mul(load(row + g), load(x + g)));
  });
}

// sum + what groups have at least, times the sums of a vector's groups.
inline Reg add_products(Reg sum, const Half* least, const float* x, int64_t count) {
  int64_t g = 0;
  for (; g + kWidth <= count; g += kWidth) {
    sum = Vec::fma(Vec::load(least + g), Vec::load(x + g), sum);
  }
  if (g < count) {
    const int64_t rest = count - g;
    sum = Vec::fma(Vec::load(least + g, rest), Vec::load(x + g, rest), sum);
  }
  return sum;
}

#endif

// out = a row's fp16 numbers times one.
inline void scale_by(const Half* row, float times, int64_t count, float* out) {
  for_lanes(count, [&](int64_t g, auto load) {
    Vec::store(out + g, Vec::mul(load(row + g), Vec::set1(times)));
  });
}

// out += a row's fp16 numbers times one.
inline void add_halves(const Half* row, float times, int64_t count, float* out) {
  for_lanes(count, [&](int64_t g, auto load) {
    Vec::store(out + g, Vec::fma(load(row + g), Vec::set1(times), Vec::load(out + g)));
  });
}

#ifdef HOTNEURON_ROW_DOT

// Long rows in 4 bits come sooner one by one, in the order in which they lie in memory: 5 % at 2 KB.
// Short ones, and those in 8 bits, do not.
template <DType kType>
inline bool one_by_one(const Rows& rows) {
  constexpr int64_t kLongRow = 1024;
  return kType == DType::u4 && rows.row_bytes() >= kLongRow;
}

// All rows with tokens t to t + kTokens.
template <DType kType, bool kOneByOne>
struct GroupRows {
  const Rows& rows;
  int64_t first, end, distance;
  const Vectors& x;
  float* y;
  int64_t ldy;
  bool accumulate;

  template <int kTokens>
  void run(int64_t t) const {
    const Vectors from = x.from(t);
    const GroupDot<kType, kTokens, kOneByOne> dot(from, rows.width / kGroup);
    for (int64_t i = first; i < end; i += kRowTile) {
      const int64_t num_rows = smaller(end - i, kRowTile);
      typename GroupDot<kType, kTokens, kOneByOne>::Row row[kRowTile];
      UNROLL
      for (int r = 0; r < kRowTile; ++r) {
        const int64_t at = i + smaller(r, num_rows - 1);  // a short tile repeats its last row
        const int64_t number = number_of(rows, at);
        row[r].q = static_cast<const uint8_t*>(rows.row(number));
        row[r].scale = static_cast<const Half*>(rows.scales(number));
        row[r].ahead = t == 0 ? ahead_of(at, row[r].q) : row[r].q;
        if (t == 0 && !kOneByOne) ask_for_rest(row[r].ahead, dot.row_bytes, rows.record_bytes());
      }
      float out[kTokens][kRowTile];
      dot.run(row, out);
      UNROLL
      for (int k = 0; k < kTokens; ++k) {
        float* y_k = y + (t + k) * ldy + i;
        if (num_rows == kRowTile && !accumulate) {
          __builtin_memcpy(y_k, out[k], sizeof(out[k]));
          continue;
        }
        for (int64_t r = 0; r < num_rows; ++r) {
          y_k[r] = accumulate ? y_k[r] + out[k][r] : out[k][r];
        }
      }
    }
  }

  const uint8_t* ahead_of(int64_t at, const uint8_t* q) const {
    if (!kOneByOne || rows.ahead) return row_ahead<uint8_t>(rows, at, distance);
    if (rows.stride == rows.record_bytes()) return q + kStreamAhead;
    return row_ahead<uint8_t>(rows, at, distance);
  }
};

#ifdef HOTNEURON_TILES

constexpr int64_t kTileFrom = 10;
constexpr int64_t kMostTileGroups = 512;  // of a row: what they need lies on the stack

template <DType kType>
void dot_tiles(const Rows& rows, const Vectors& x, int64_t num_tokens, float* y, int64_t ldy,
               bool accumulate) {
  using Dot = TileDot<kType>;
  const int64_t distance = distance_ahead(rows, Dot::kRows);
  const int64_t num_groups = rows.width / kGroup;
  alignas(64) int8_t memory[Dot::memory_for(kMostTileGroups)];
  Dot dot(num_groups, memory);
  const TileConfig config = tile_config();
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < rows.count; i += Dot::kRows) {
    const int64_t num_rows = smaller(rows.count - i, Dot::kRows);
    typename Dot::Row row[Dot::kRows];
    for (int64_t r = 0; r < Dot::kRows; ++r) {
      const int64_t at = i + smaller(r, num_rows - 1);
      const int64_t number = number_of(rows, at);
      row[r] = {static_cast<const uint8_t*>(rows.row(number)),
                row_ahead<uint8_t>(rows, at, distance),
                static_cast<const Half*>(rows.scales(number))};
      if (r < num_rows) ask_for_rest(row[r].ahead, rows.row_bytes(), rows.record_bytes());
    }
    dot.load(row);
    for (int64_t t = 0; t < num_tokens; t += hotneuron::kTileTokens) {
      Reg out[Dot::kRows];
      dot.multiply(x.tiles[t / hotneuron::kTileTokens], t == 0 ? row : nullptr, out);
      alignas(64) float value[Dot::kRows][kWidth];
      for (int r = 0; r < Dot::kRows; ++r) Vec::store(value[r], out[r]);
      const int64_t end = smaller(num_tokens - t, hotneuron::kTileTokens);
      for (int64_t k = 0; k < end; ++k) {
        float* y_k = y + (t + k) * ldy + i;
        for (int64_t r = 0; r < num_rows; ++r) {
          y_k[r] = accumulate ? y_k[r] + value[r][k] : value[r][k];
        }
      }
    }
  }
  _tile_release();
}

#else
constexpr int64_t kTileFrom = 0;
#endif

// Rows that stay in the first cache while all tokens use them.
constexpr int64_t kCachedBytes = 16 * 1024;

template <DType kType>
void dot_groups(const Rows& rows, const Vectors& x, int64_t num_tokens, float* y, int64_t ldy,
                bool accumulate) {
#ifdef HOTNEURON_TILES
  if (x.tiles && rows.width <= kMostTileGroups * kGroup) {
    return dot_tiles<kType>(rows, x, num_tokens, y, ldy, accumulate);
  }
#endif
  const int64_t distance = distance_ahead(rows, kRowTile);
  int64_t step = rows.count;
  if (num_tokens > Vec::kTokenTile) {
    step = smaller(step, kCachedBytes / (rows.record_bytes() * kRowTile) * kRowTile + kRowTile);
  }
  for (int64_t i = 0; i < rows.count; i += step) {
    const int64_t end = smaller(i + step, rows.count);
    if (one_by_one<kType>(rows)) {
      using Work = GroupRows<kType, true>;
      for_token_tiles(Work{rows, i, end, distance, x, y, ldy, accumulate}, num_tokens);
    } else {
      using Work = GroupRows<kType, false>;
      for_token_tiles(Work{rows, i, end, distance, x, y, ldy, accumulate}, num_tokens);
    }
  }
}

#else

constexpr int64_t kTileFrom = 0;

// What `dot_groups` does with one tile of grouped rows.
template <DType kType>
struct GroupTile {
  static constexpr int64_t kBytes = kType == DType::q8 ? kGroup : kGroup / 2;
  const uint8_t* row[kRowTile];
  const Half* scale[kRowTile];
  const uint8_t* ahead[kRowTile];
  int64_t num_rows, num_groups, record_bytes;
  const Vectors& x;
  float* y;
  int64_t ldy;
  bool accumulate;

  template <int kTokens>
  void run(int64_t t) const {
    const uint8_t* const* wanted = t == 0 ? ahead : row;
    for (int r = 0; r < kRowTile; ++r) ask_for_rest(wanted[r], num_groups * kBytes, record_bytes);
    Reg sum[kTokens][kRowTile];
    dot<kTokens>(wanted, x.from(t), sum);
    for (int k = 0; k < kTokens; ++k) {
      float out[kRowTile];
      Vec::sum4(sum[k], out);
      float* y_t = y + (t + k) * ldy;
      for (int64_t r = 0; r < num_rows; ++r) y_t[r] = accumulate ? y_t[r] + out[r] : out[r];
    }
  }

  template <int kTokens>
  void dot(const uint8_t* const* wanted, const Vectors& from, Reg (*sum)[kRowTile]) const {
    const int64_t C = num_groups;
    const int64_t groups_apart = from.ld / kGroup;
    UNROLL
    for (int k = 0; k < kTokens; ++k) {
      UNROLL
      for (int r = 0; r < kRowTile; ++r) sum[k][r] = Vec::set1(0.0f);
    }
    for (int64_t first = 0; first < C; first += kScales) {
      const int64_t end = smaller(first + kScales, C);
      alignas(64) float product[kTokens][kRowTile][kScales];  // stores that cross lines are slow
      for (int k = 0; k < kTokens; ++k) {
        const float* x_scale = from.scale + k * groups_apart + first;
        for (int r = 0; r < kRowTile; ++r) {
          scale_products(scale[r] + first, x_scale, end - first, product[k][r]);
          if (kType == DType::u4) {
            const float* x_sum = from.sum + k * groups_apart + first;
            sum[k][r] = add_products(sum[k][r], scale[r] + C + first, x_sum, end - first);
          }
        }
      }
      for (int64_t g = first; g < end; ++g) {
        if (g * kBytes % kLineBytes == 0) {
          UNROLL
          for (int r = 0; r < kRowTile; ++r) ask_for(wanted[r] + g * kBytes);
        }
        GroupWeight<kType> weight[kRowTile];
        UNROLL
        for (int r = 0; r < kRowTile; ++r) weight[r].load(row[r] + g * kBytes);
        UNROLL
        for (int k = 0; k < kTokens; ++k) {
          const GroupInput<kType> input(from.q + k * from.ld + g * kGroup);
          UNROLL
          for (int r = 0; r < kRowTile; ++r) {
            sum[k][r] = add_group(sum[k][r], weight[r], input, product[k][r][g - first]);
          }
        }
      }
    }
  }
};

template <DType kType>
void dot_groups(const Rows& rows, const Vectors& x, int64_t num_tokens, float* y, int64_t ldy,
                bool accumulate) {
  const int64_t distance = distance_ahead(rows, kRowTile);
  for (int64_t i = 0; i < rows.count; i += kRowTile) {
    const int64_t num_rows = smaller(rows.count - i, kRowTile);
    GroupTile<kType> tile = {{}, {}, {}, num_rows, rows.width / kGroup, rows.record_bytes(),
                             x,  y + i, ldy, accumulate};
    UNROLL
    for (int r = 0; r < kRowTile; ++r) {
      const int64_t row = i + smaller(r, num_rows - 1);  // a short tile repeats its last row
      tile.row[r] = row_at<uint8_t>(rows, row);
      tile.scale[r] = static_cast<const Half*>(rows.scales(number_of(rows, row)));
      tile.ahead[r] = row_ahead<uint8_t>(rows, row, distance);
    }
    for_token_tiles(tile, num_tokens);
  }
}

#endif

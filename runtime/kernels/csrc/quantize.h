// Weights in 8 or 4 bits (q8, u4 of kernels.h): rows of whole numbers in groups of kGroup columns,
// what they mean in fp16 behind them.
//
// The result is the same on every machine: this code has one version, for the base instruction set.
#pragma once

#include <cstdint>

#include "linear.h"

namespace hotneuron {

// Bytes of a row: whole numbers, the groups' scales, and of u4 what they have at least.
int64_t grouped_row_bytes(DType dtype, int64_t num_columns);
// `stride`: bytes from one row to the next.
Matrix grouped_matrix(const void* data, DType dtype, int64_t num_rows, int64_t num_columns,
                      int64_t stride);

// Rounds f32 or bf16 weights into rows of `dtype`. q8: scale = largest size / 127. u4: the grid of
// least squared error among some that span all or most of the group's range, and their refits.
// Throws std::invalid_argument if a weight is not finite or too large for fp16.
void quantize(const Matrix& weights, DType dtype, void* rows);
// The values of rows [begin, begin + count), as f32 or bf16 (to nearest).
void dequantize(const Matrix& grouped, int64_t begin, int64_t count, DType dtype, void* out);

}  // namespace hotneuron

// Dense products and norms over a few tokens, spread over the pool's threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hotneuron {

// A weight matrix [rows, columns] as its owner's pointer.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t num_rows, num_columns;

  Rows rows() const { return {data, dtype, num_columns, num_columns, num_rows}; }
};

struct Norm {
  const void* weight;
  DType dtype;
  float eps;
};

// y_NO = x_ND w_OD^T, or += with `accumulate`.
void linear(const float* x_ND, int64_t num_tokens, const Matrix& w_OD, float* y_NO,
            bool accumulate);
void rms_norm(const float* x_ND, int64_t num_tokens, int64_t width, const Norm& norm, float* y_ND);
// y_NO = rms_norm(x_ND) w_OD^T
void norm_linear(const float* x_ND, int64_t num_tokens, const Norm& norm, const Matrix& w_OD,
                 float* y_NO);

}  // namespace hotneuron

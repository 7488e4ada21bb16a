// Dense products and norms over a few tokens, spread over the pool's threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hotneuron {

// A weight matrix [rows, columns] as its owner's pointer. The scales of grouped weights stand
// behind each row's whole numbers, or in an array of their own.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t num_rows, num_columns;
  int64_t stride;  // bytes from one row to the next
  const void* scale = nullptr;
  int64_t scale_stride = 0;

  Rows rows() const {
    return {data, dtype, stride, num_columns, num_rows, scale, scale_stride};
  }
};

// Rows one behind the other.
inline Matrix plain_matrix(const void* data, DType dtype, int64_t num_rows, int64_t num_columns) {
  return {data, dtype, num_rows, num_columns, bytes_of(dtype, num_columns)};
}

struct Norm {
  const void* weight;
  DType dtype;
  float eps;
};

// x_ND as rows of this type want it. What they need beside the floats lies in the calling thread's
// scratch memory until its next call.
Vectors vectors_for(DType dtype, const float* x_ND, int64_t num_tokens, int64_t width);
// The same in memory of its own, beside that: until the next call of this one.
Vectors more_vectors_for(DType dtype, const float* x_ND, int64_t num_tokens, int64_t width);

// y_NO = x_ND w_OD^T, or += with `accumulate`.
void linear(const float* x_ND, int64_t num_tokens, const Matrix& w_OD, float* y_NO,
            bool accumulate);
void rms_norm(const float* x_ND, int64_t num_tokens, int64_t width, const Norm& norm, float* y_ND);
// y_NO = rms_norm(x_ND) w_OD^T
void norm_linear(const float* x_ND, int64_t num_tokens, const Norm& norm, const Matrix& w_OD,
                 float* y_NO);

}  // namespace hotneuron

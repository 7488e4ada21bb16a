// Reads a tensor argument: what it points to, its dtype and shape, checked against what is
// expected.
//
// Any DLPack producer on the CPU will do. Torch's C exchange API (torch >= 2.10) answers in some
// tens of nanoseconds; the Python protocol, used where it is missing, takes microseconds.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "kernels.h"

namespace hotneuron {

namespace nb = nanobind;

enum class Element { f32, bf16, f16, i8, u8, i64, boolean, other };

// Rows of a matrix may have room between them.
enum class Layout { contiguous, rows_apart };

class TensorArg {
 public:
  // Throws ValueError unless `tensor` is a CPU tensor in this layout. `name` is for messages.
  TensorArg(nb::handle tensor, const char* name, Layout layout = Layout::contiguous);

  // Throws unless the shape is this one; -1 takes any size.
  const TensorArg& shaped(std::initializer_list<int64_t> expected) const;
  const TensorArg& of(std::initializer_list<Element> expected) const;

  int64_t size(int dim) const { return shape_.at(dim); }
  // Elements from one row of a matrix to the next.
  int64_t row_stride() const { return row_stride_; }
  Element element() const { return element_; }
  DType dtype() const;  // of f32, bf16, i8
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  void read(void* data, int64_t byte_offset, int device, int code, int bits, int lanes, int ndim,
            const int64_t* shape, const int64_t* strides, Layout layout);
  [[noreturn]] void fail(const std::string& expected) const;

  const char* name_;
  void* data_ = nullptr;
  Element element_ = Element::other;
  std::string type_name_;
  std::vector<int64_t> shape_;
  int64_t row_stride_ = 0;
};

}  // namespace hotneuron

// Which rows a thread reads next, for matrices of which it reads a few rows each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "scratch.h"

namespace hotneuron {

// The rows that are about to be read, in order. Each kernel call asks for those further on while it
// reads its own.
class ReadingOrder {
 public:
  ReadingOrder(int64_t capacity, int64_t distance)
      : rows_(scratch<ReadingOrder, const void*>(capacity + distance)), distance_(distance) {}

  void clear() { end_ = next_ = 0; }
  void add(const Rows& matrix, const int32_t* index, int64_t count) {
    for (int64_t i = 0; i < count; ++i) rows_[end_++] = matrix.row(index[i]);
  }
  void finish() {
    const void* last = end_ > 0 ? rows_[end_ - 1] : nullptr;
    std::fill_n(rows_ + end_, distance_, last);
  }
  // The next `count` rows are read now.
  Rows take(const Rows& matrix, const int32_t* index, int64_t count) {
    const void* const* ahead = rows_ + std::min(next_ + distance_, end_);
    next_ += count;
    return matrix.listed(index, count, ahead);
  }

 private:
  const void** rows_;
  int64_t distance_, next_ = 0, end_ = 0;
};

}  // namespace hotneuron

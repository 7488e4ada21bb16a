// Memory for intermediate results: one growing buffer per purpose and thread.
#pragma once

#include <cstdint>
#include <vector>

namespace hotneuron {

// The Tag keeps buffers that live at the same time apart. Contents are undefined.
template <class Tag, class T = float>
T* scratch(int64_t size) {
  thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

}  // namespace hotneuron

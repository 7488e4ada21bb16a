// Memory for intermediate results: one growing buffer per purpose and thread.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

namespace hotneuron {

constexpr std::align_val_t kScratchAlignment{64};  // a cache line, and the widest register

struct FreeScratch {
  void operator()(void* memory) const { ::operator delete(memory, kScratchAlignment); }
};

// The Tag keeps buffers that live at the same time apart. Contents are undefined.
template <class Tag, class T = float>
T* scratch(int64_t size) {
  static_assert(std::is_trivially_destructible_v<T>, "buffers are freed as raw memory");
  thread_local std::unique_ptr<void, FreeScratch> buffer;
  thread_local int64_t capacity = 0;
  if (capacity < size) {
    buffer.reset(::operator new(size * sizeof(T), kScratchAlignment));
    capacity = size;
  }
  return static_cast<T*>(buffer.get());
}

}  // namespace hotneuron

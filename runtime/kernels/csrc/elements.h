// 16-bit elements as types of their own, so that loads can be overloaded by them. In an unnamed
// namespace, as all that is compiled once per instruction set.
#pragma once

namespace {
struct Bf16 {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};
}  // namespace

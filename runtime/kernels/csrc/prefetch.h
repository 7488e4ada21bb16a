// Asking for memory ahead of its use. In an unnamed namespace, as all that is compiled once per
// instruction set.
#pragma once

#include <stdint.h>

#include "unroll.h"

namespace {

// Rows are a page or less each, and several are read at once: too little of a stream for the
// hardware to see. So while a line of a row is used, the same line of a row further on is asked
// for, into the second cache, which can wait for more lines than the first. Not more at a time: a
// burst of requests is slower than none. The distance is flat around its optimum, 4 to 14 KB on
// Zen 5 and Sapphire Rapids.
constexpr int64_t kLineBytes = 64;
inline void ask_for(const void* line) { __builtin_prefetch(line, 0, 2); }

template <int kLines>
inline void ask_for_lines(const uint8_t* first) {
  UNROLL16
  for (int i = 0; i < kLines; ++i) ask_for(first + i * kLineBytes);
}

// How far ahead where memory is read from one end to the other: while that is the same page, the
// hardware goes along. On Sapphire Rapids 3 KB is best, and 4 KB and more are slower.
constexpr int64_t kStreamAhead = 3072;

// What follows `begin` bytes of a record that is about to be read: a line of its own, mostly.
inline void ask_for_rest(const uint8_t* record, int64_t begin, int64_t end) {
  for (int64_t b = (begin + kLineBytes - 1) / kLineBytes * kLineBytes; b < end; b += kLineBytes) {
    ask_for(record + b);
  }
  ask_for(record + end - 1);
}

}  // namespace

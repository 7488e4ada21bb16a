// Tiles live in registers only if the loops over them are gone.
#pragma once

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL16 UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL16 _Pragma("GCC unroll 16")
#endif

#define INLINE inline __attribute__((always_inline))

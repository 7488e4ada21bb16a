#include "kernels.h"

namespace {
struct Bf16 {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};
}  // namespace

#include "simd_generic.h"

#define HOTNEURON_TABLE kGenericKernels
#define HOTNEURON_NAME "generic"
#include "kernels.inl"

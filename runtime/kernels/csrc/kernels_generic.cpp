#include "prefetch.h"
#include "simd_generic.h"
#include "unroll.h"

#define HOTNEURON_TABLE kGenericKernels
#define HOTNEURON_NAME "generic"
#include "kernels.inl"

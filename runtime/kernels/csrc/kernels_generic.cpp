#include "simd_generic.h"

#define HOTNEURON_TABLE kGenericKernels
#define HOTNEURON_NAME "generic"
#include "kernels.inl"

#include "simd_avx512.h"

#define HOTNEURON_TABLE kAvx512Kernels
#define HOTNEURON_NAME "avx512"
#include "kernels.inl"

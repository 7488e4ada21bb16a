#include "prefetch.h"
#include "simd_avx2.h"
#include "unroll.h"

#define HOTNEURON_TABLE kAvx2Kernels
#define HOTNEURON_NAME "avx2"
#include "kernels.inl"

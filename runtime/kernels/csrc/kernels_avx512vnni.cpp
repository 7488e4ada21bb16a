#define HOTNEURON_VNNI
#include "simd_avx512.h"

#define HOTNEURON_TABLE kAvx512VnniKernels
#define HOTNEURON_NAME "avx512vnni"
#include "kernels.inl"

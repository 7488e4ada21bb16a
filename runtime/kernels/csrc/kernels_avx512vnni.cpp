#define HOTNEURON_VNNI
#include "groups_avx512.h"

#define HOTNEURON_ROW_DOT
#define HOTNEURON_TABLE kAvx512VnniKernels
#define HOTNEURON_NAME "avx512vnni"
#include "kernels.inl"

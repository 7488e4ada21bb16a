#include "groups_avx512.h"

#define HOTNEURON_ROW_DOT
#define HOTNEURON_TABLE kAvx512Kernels
#define HOTNEURON_NAME "avx512"
#include "kernels.inl"

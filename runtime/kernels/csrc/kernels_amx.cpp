#define HOTNEURON_VNNI
#include "groups_amx.h"

#define HOTNEURON_ROW_DOT
#define HOTNEURON_TILES
#define HOTNEURON_TABLE kAmxKernels
#define HOTNEURON_NAME "amx"
#include "kernels.inl"

// vectors.h on AVX2 and FMA.
#define STRACE_VECTORS vectors_avx2
#include "vectors_body.h"

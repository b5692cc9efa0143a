// vectors.h on AVX-512.
#define STRACE_VECTORS vectors_avx512
#include "vectors_body.h"

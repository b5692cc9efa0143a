// vectors.h on any machine.
#define STRACE_VECTORS vectors_portable
#include "vectors_body.h"

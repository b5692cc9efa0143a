// Which instruction set's vectors.h functions run: that of the kernels.
#include "vectors.h"

#include <cstring>

#include "kernels.h"

namespace strace {

extern const Vectors vectors_portable;
#if defined(__x86_64__)
extern const Vectors vectors_avx512, vectors_avx2;
#endif

const Vectors &vectors() {
#if defined(__x86_64__)
  if (std::strncmp(kernels().name, "avx512", 6) == 0) return vectors_avx512;
  if (std::strcmp(kernels().name, "avx2") == 0) return vectors_avx2;
#endif
  return vectors_portable;
}

}  // namespace strace

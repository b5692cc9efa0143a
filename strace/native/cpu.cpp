// Which instruction set's kernels run: the best that this CPU has, or the lesser one that STRACE_ISA names.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(STRACE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace strace {

extern const Kernels PORTABLE;
#if defined(__x86_64__)
extern const Kernels AMX, AVX512_BF16, AVX512, AVX2;
#endif

namespace {

// Whether STRACE_ISA names these.
bool asked_for(const Kernels &kernels) {
  const char *asked = std::getenv("STRACE_ISA");
  return asked && std::strcmp(asked, kernels.name) == 0;
}

// Whether STRACE_ISA leaves these to be chosen.
bool wanted(const Kernels &kernels) {
  const char *asked = std::getenv("STRACE_ISA");
  return !asked || !*asked || asked_for(kernels);
}

#if defined(STRACE_AMX)
// Linux saves tile registers only of processes that have asked for them.
bool permit_tiles() {
  constexpr int REQUEST_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
}
#endif

const Kernels &choose() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(STRACE_AMX)
  const bool amx = bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  if (amx && wanted(AMX) && permit_tiles()) return AMX;
#endif
  // Intel's products of bf16 pairs are half as fast as float32's.
  if (bf16 && (asked_for(AVX512_BF16) || (wanted(AVX512_BF16) && !__builtin_cpu_is("intel")))) return AVX512_BF16;
  if (avx512 && wanted(AVX512)) return AVX512;
  if (avx2 && wanted(AVX2)) return AVX2;
#endif
  return PORTABLE;
}

}  // namespace

const Kernels &kernels() {
  static const Kernels &chosen = choose();
  return chosen;
}

}  // namespace strace

const char *st_isa(void) { return strace::kernels().name; }

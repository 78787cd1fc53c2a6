#include "core/tiles.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vai {

// Linux: Documentation/arch/x86/xstate.rst.
bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool tiles_promised([[maybe_unused]] TileUnit unit) {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vnni"))
    return false;
  if (unit == TileUnit::kBf16 && !__builtin_cpu_supports("avx512bf16")) return false;
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  const unsigned wanted = kAmxTile | (unit == TileUnit::kBf16 ? kAmxBf16 : kAmxInt8);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
  constexpr unsigned kTileState = 3u << 17;  // of what the operating system saves; readable, as AVX-512 is there
  asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & kTileState) == kTileState && tiles_granted();
#else
  return false;
#endif
}

}  // namespace vai

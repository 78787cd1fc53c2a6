#include "core/isa.h"

#include "core/selftest.h"
#include "core/tiles.h"

namespace vai {

#define VAI_ISA(name)                                                 \
  int row_block_##name(int);                                          \
  void norm_##name(const NormArgs&, int, int);                        \
  void linear_##name(const LinearArgs&, int, int);                    \
  void glu_##name(const GluArgs&, int, int);                          \
  void attention_##name(const AttentionArgs&, int, float*);           \
  double probabilities_##name(const ProbabilitiesArgs&);              \
  static const Isa k_##name{#name,         row_block_##name, norm_##name,         linear_##name, \
                            glu_##name,    attention_##name, probabilities_##name};

VAI_ISA(scalar)
#if defined(__x86_64__)
VAI_ISA(avx2)
VAI_ISA(avx512)
// AVX-512 with tiles for the integers of many rows.
int row_block_amx(int);
void linear_amx(const LinearArgs&, int, int);
static const Isa k_amx{"amx", row_block_amx, norm_avx512, linear_amx, glu_avx512, attention_avx512, probabilities_avx512};
#endif

const std::vector<const Isa*>& built_isas() {
  static const std::vector<const Isa*> isas{
      &k_scalar,
#if defined(__x86_64__)
      &k_avx2, &k_avx512, &k_amx,
#endif
  };
  return isas;
}

// What the processor says it has, and the operating system supports.
static bool promised(const Isa& isa) {
#if defined(__x86_64__)
  if (&isa == &k_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (&isa == &k_amx) return kEmulated || tiles_promised(TileUnit::kInt8);
  if (&isa == &k_avx512)
    return kEmulated || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vnni"));
#endif
  return &isa == &k_scalar;
}

struct Found {
  std::vector<const Isa*> available;
  std::vector<RefusedIsa> refused;
};

static const Found& find() {
  static const Found found = [] {
    Found made;
    for (const Isa* isa : built_isas()) {
      if (!promised(*isa)) continue;
      const char* wrong = isa == &k_scalar ? nullptr : self_test(*isa, k_scalar);
      if (wrong)
        made.refused.push_back({isa, wrong});
      else
        made.available.push_back(isa);
    }
    return made;
  }();
  return found;
}

const std::vector<const Isa*>& available_isas() { return find().available; }
const std::vector<RefusedIsa>& refused_isas() { return find().refused; }

}  // namespace vai

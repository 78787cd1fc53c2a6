#include "core/isa.h"

namespace vai {

#define VAI_ISA(name)                                                 \
  int row_block_##name(int);                                          \
  void norm_##name(const NormArgs&, int, int);                        \
  void linear_##name(const LinearArgs&, int, int);                    \
  void glu_##name(const GluArgs&, int, int);                          \
  void attention_##name(const AttentionArgs&, int, float*);           \
  bool probabilities_##name(const ProbabilitiesArgs&, float*);        \
  static const Isa k_##name{#name,         row_block_##name, norm_##name,         linear_##name, \
                            glu_##name,    attention_##name, probabilities_##name};

VAI_ISA(scalar)
#if defined(__x86_64__)
VAI_ISA(avx2)
VAI_ISA(avx512)
#endif

const std::vector<const Isa*>& available_isas() {
  static const std::vector<const Isa*> isas = [] {
    std::vector<const Isa*> list{&k_scalar};
#if defined(__x86_64__)
    // These ask for the operating system's support too.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) list.push_back(&k_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
      list.push_back(&k_avx512);
#endif
    return list;
  }();
  return isas;
}

}  // namespace vai

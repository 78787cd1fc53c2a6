// The AVX-512-VNNI implementation; the loops are in attention_impl.h.
#include "vai/vec_avx512.h"

#include "attention_impl.h"

namespace vai {
void attention_avx512(const AttentionArgs& a, int unit, float* scratch) { attention<Avx512Vec>(a, unit, scratch); }
}  // namespace vai

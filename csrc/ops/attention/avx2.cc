// The AVX2 implementation; the loops are in attention_impl.h.
#include "vai/vec_avx2.h"

#include "attention_impl.h"

namespace vai {
void attention_avx2(const AttentionArgs& a, int unit, float* scratch) { attention<Avx2Vec>(a, unit, scratch); }
}  // namespace vai

// The portable implementation; the loops are in attention_impl.h.
#include "vai/vec_scalar.h"

#include "attention_impl.h"

namespace vai {
void attention_scalar(const AttentionArgs& a, int unit, float* scratch) { attention<ScalarVec>(a, unit, scratch); }
}  // namespace vai

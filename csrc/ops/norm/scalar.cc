// The portable implementation; the loops are in norm_impl.h.
#include "vai/vec_scalar.h"

#include "norm_impl.h"

namespace vai {
void norm_scalar(const NormArgs& a, int begin, int end) { norm<ScalarVec>(a, begin, end); }
}  // namespace vai

// The portable implementation; the loops are in glu_impl.h.
#include "vai/vec_scalar.h"

#include "glu_impl.h"

namespace vai {
void glu_scalar(const GluArgs& a, int begin, int end) { glu<ScalarVec>(a, begin, end); }
}  // namespace vai

// The portable implementation; the loops are in linear_impl.h.
#include "vai/vec_scalar.h"

#include "linear_impl.h"

namespace vai {
void linear_scalar(const LinearArgs& a, int begin, int end) { linear<ScalarVec>(a, begin, end); }
int row_block_scalar(int rows) { return ScalarVec::row_block(rows); }
}  // namespace vai

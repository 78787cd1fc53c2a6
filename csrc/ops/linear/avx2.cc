// The AVX2 implementation; the loops are in linear_impl.h.
#include "vai/vec_avx2.h"

#include "linear_impl.h"

namespace vai {
void linear_avx2(const LinearArgs& a, int begin, int end) { linear<Avx2Vec>(a, begin, end); }
int row_block_avx2(int rows) { return Avx2Vec::row_block(rows); }
}  // namespace vai

// The AVX-512-VNNI implementation; the loops are in linear_impl.h.
#include "vai/vec_avx512.h"

#include "linear_impl.h"

namespace vai {
void linear_avx512(const LinearArgs& a, int begin, int end) { linear<Avx512Vec>(a, begin, end); }
int row_block_avx512(int rows) { return Avx512Vec::row_block(rows); }
}  // namespace vai

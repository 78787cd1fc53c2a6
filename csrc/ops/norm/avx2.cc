// The AVX2 implementation; the loops are in norm_impl.h.
#include "vai/vec_avx2.h"

#include "norm_impl.h"

namespace vai {
void norm_avx2(const NormArgs& a, int begin, int end) { norm<Avx2Vec>(a, begin, end); }
}  // namespace vai

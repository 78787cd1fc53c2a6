// The AVX2 implementation; the loops are in glu_impl.h.
#include "vai/vec_avx2.h"

#include "glu_impl.h"

namespace vai {
void glu_avx2(const GluArgs& a, int begin, int end) { glu<Avx2Vec>(a, begin, end); }
}  // namespace vai

// The AVX-512-VNNI implementation; the loops are in glu_impl.h.
#include "vai/vec_avx512.h"

#include "glu_impl.h"

namespace vai {
void glu_avx512(const GluArgs& a, int begin, int end) { glu<Avx512Vec>(a, begin, end); }
}  // namespace vai

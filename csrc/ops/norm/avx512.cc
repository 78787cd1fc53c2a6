// The AVX-512-VNNI implementation; the loops are in norm_impl.h.
#include "vai/vec_avx512.h"

#include "norm_impl.h"

namespace vai {
void norm_avx512(const NormArgs& a, int begin, int end) { norm<Avx512Vec>(a, begin, end); }
}  // namespace vai

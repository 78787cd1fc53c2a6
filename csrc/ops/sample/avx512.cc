// The AVX-512-VNNI implementation; the loops are in probabilities_impl.h.
#include "vai/vec_avx512.h"

#include "probabilities_impl.h"

namespace vai {
double probabilities_avx512(const ProbabilitiesArgs& a) { return probabilities<Avx512Vec>(a); }
}  // namespace vai

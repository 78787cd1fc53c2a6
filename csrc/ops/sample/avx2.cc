// The AVX2 implementation; the loops are in probabilities_impl.h.
#include "vai/vec_avx2.h"

#include "probabilities_impl.h"

namespace vai {
double probabilities_avx2(const ProbabilitiesArgs& a) { return probabilities<Avx2Vec>(a); }
}  // namespace vai

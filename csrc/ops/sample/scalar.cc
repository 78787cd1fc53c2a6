// The portable implementation; the loops are in probabilities_impl.h.
#include "vai/vec_scalar.h"

#include "probabilities_impl.h"

namespace vai {
double probabilities_scalar(const ProbabilitiesArgs& a) { return probabilities<ScalarVec>(a); }
}  // namespace vai

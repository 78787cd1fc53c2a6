// The portable implementation; the loops are in probabilities_impl.h.
#include "vai/vec_scalar.h"

#include "probabilities_impl.h"

namespace vai {
bool probabilities_scalar(const ProbabilitiesArgs& a, float* maximum) { return probabilities<ScalarVec>(a, maximum); }
}  // namespace vai

// The implementations of the fast kind this machine has.
#pragma once

#include <vector>

#include "vai/ops.h"

namespace vai {

struct RefusedFast {
  const Fast* fast;
  const char* reason;
};

// What the machine promises and a self-test found kept, the portable one first: made once, at the first call, which takes
// milliseconds.
const std::vector<const Fast*>& available_fasts();
// What it promises and does not keep.
const std::vector<RefusedFast>& refused_fasts();

}  // namespace vai

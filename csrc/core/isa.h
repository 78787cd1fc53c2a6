// The instruction sets this machine has, the best one last, each with its table of implementations.
#pragma once

#include <vector>

#include "vai/ops.h"

namespace vai {

const std::vector<const Isa*>& available_isas();

}  // namespace vai

// The instruction sets this machine has, the best one last, each with its table of implementations.
#pragma once

#include <vector>

#include "vai/ops.h"

namespace vai {

struct RefusedIsa {
  const Isa* isa;
  const char* reason;
};

// Those that were compiled, the portable one first; calling what the machine lacks ends the process.
const std::vector<const Isa*>& built_isas();
// Of those, what the machine promises and a self-test found kept: made once, at the first call, which takes milliseconds.
const std::vector<const Isa*>& available_isas();
// What it promises and does not keep.
const std::vector<RefusedIsa>& refused_isas();

}  // namespace vai

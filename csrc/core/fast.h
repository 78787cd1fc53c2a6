// The implementations of the fast kind this machine has.
#pragma once

#include <vector>

#include "vai/ops.h"

namespace vai {

struct RefusedFast {
  const Fast* fast;
  const char* reason;
};

// Those that were compiled, the portable one first; calling what the machine lacks ends the process.
const std::vector<const Fast*>& built_fasts();
// Of those, what the machine promises and a self-test found kept: made once, at the first call, which takes milliseconds.
const std::vector<const Fast*>& available_fasts();
// What it promises and does not keep.
const std::vector<RefusedFast>& refused_fasts();

// Runs a small layer of every type in a forked child and compares it with the portable implementation. Bits are not asked
// for: a processor that adds in another order is of use too, and the name of what computed them is in the keys of its pages.
// Null if all is as near as rounding allows, else what went wrong, in a few words.
const char* self_test(const Fast& fast, const Fast& portable);

}  // namespace vai

// Whether an instruction set does here what it should: a hypervisor or an emulator may promise what it does not keep.
#pragma once

#include "vai/ops.h"

namespace vai {

// Runs a small case of every operation in a forked child and compares its bits with the portable implementation's. Null if
// they are equal, else what went wrong, in a few words.
const char* self_test(const Isa& isa, const Isa& portable);

}  // namespace vai

// Whether an instruction set does here what it should: a hypervisor or an emulator may promise what it does not keep.
#pragma once

#include <functional>

#include "vai/ops.h"

namespace vai {

// Whether AVX-512 and AMX were compiled to be emulated (CMakeLists.txt: VAI_EMULATED), and so are there on any machine.
#ifdef VAI_EMULATED
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// Runs `verdict` in a forked child, where an instruction that faults ends nothing else. Null if it is true, `wrong` if it is
// false, else what came between, in a few words. It must not allocate: the process may have other threads.
const char* tried_in_a_child(const std::function<bool()>& verdict, const char* wrong);

// Runs a small case of every operation in a forked child and compares its bits with the portable implementation's. Null if
// they are equal, else what went wrong, in a few words.
const char* self_test(const Isa& isa, const Isa& portable);

}  // namespace vai

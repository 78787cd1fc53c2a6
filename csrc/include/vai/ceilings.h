// What the machine can do at most: loops that only read, or only multiply and add, to print every speed beside its ceiling.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vai {

// One instruction set's loops. `multiply_*`: that many rounds of independent multiply-adds in registers, in the operations
// that the exact kind uses; return how many multiply-adds those were. `read`: every line of [data, data + bytes).
struct Ceilings {
  const char* name;
  uint64_t (*multiply_int8)(int rounds);
  uint64_t (*multiply_f32)(int rounds);
  void (*read)(const uint8_t* data, size_t bytes);
};

}  // namespace vai

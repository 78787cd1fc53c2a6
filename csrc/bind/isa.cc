// Which instruction sets this machine has.
#include <stdexcept>
#include <string>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "core/isa.h"

namespace nb = nanobind;

const vai::Isa& isa_by_name(const char* name) {
  for (const vai::Isa* isa : vai::available_isas())
    if (std::string(isa->name) == name) return *isa;
  throw std::invalid_argument(std::string("this machine has no implementation called ") + name);
}

void bind_isa(nb::module_& m) {
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const vai::Isa* isa : vai::available_isas()) names.emplace_back(isa->name);
    return names;
  });
  m.def("attention_scratch", [](size_t context, int head_dim) { return vai::attention_scratch(context, head_dim); });
}

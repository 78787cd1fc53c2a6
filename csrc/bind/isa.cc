// Which instruction sets this machine has, and which implementations of the fast kind.
#include <stdexcept>
#include <string>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "core/fast.h"
#include "core/isa.h"
#include "core/selftest.h"

namespace nb = nanobind;

const vai::Isa& isa_by_name(const char* name) {
  for (const vai::Isa* isa : vai::available_isas())
    if (std::string(isa->name) == name) return *isa;
  throw std::invalid_argument(std::string("this machine has no implementation called ") + name);
}

void bind_isa(nb::module_& m) {
  m.attr("emulated") = vai::kEmulated;
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const vai::Isa* isa : vai::available_isas()) names.emplace_back(isa->name);
    return names;
  });
  m.def("refused_isas", [] {
    std::vector<std::pair<std::string, std::string>> refused;
    for (const auto& [isa, reason] : vai::refused_isas()) refused.emplace_back(isa->name, reason);
    return refused;
  });
  m.def("self_test", [](const std::string& name) -> std::string {
    const nb::gil_scoped_release released;
    for (const vai::Isa* isa : vai::built_isas())
      if (isa->name == name) {
        const char* wrong = vai::self_test(*isa, *vai::built_isas().front());
        return wrong ? wrong : "";
      }
    for (const vai::Fast* fast : vai::built_fasts())
      if (fast->name == name) {
        const char* wrong = vai::self_test(*fast, *vai::built_fasts().front());
        return wrong ? wrong : "";
      }
    return "it was not built";
  }, nb::arg("name"));
  m.def("fasts", [] {
    std::vector<std::string> names;
    for (const vai::Fast* fast : vai::available_fasts()) names.emplace_back(fast->name);
    return names;
  });
  m.def("refused_fasts", [] {
    std::vector<std::pair<std::string, std::string>> refused;
    for (const auto& [fast, reason] : vai::refused_fasts()) refused.emplace_back(fast->name, reason);
    return refused;
  });
  m.def("narrow_bytes", [](int columns) { return vai::narrow_bytes(columns); });
  m.def("fast_attention_scratch", [](size_t context, int head_dim) { return vai::fast_attention_scratch(context, head_dim); });
  m.def("fast_scratch", [](int columns) { return vai::fast_scratch(columns); });
  m.def("attention_scratch", [](size_t context, int head_dim) { return vai::attention_scratch(context, head_dim); });
}

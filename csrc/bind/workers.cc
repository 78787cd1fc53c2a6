// The thread pool, made only when asked for.
#include "core/workers.h"

#include <nanobind/stl/string.h>

#include "bind/bind.h"

namespace nb = nanobind;

void bind_workers(nb::module_& m) {
  nb::class_<vai::Workers>(m, "Workers")
      .def(nb::init<int, const std::string&>(), nb::arg("threads"), nb::arg("lease") = "")
      .def_prop_ro("threads", &vai::Workers::count)
      .def_prop_rw("ahead", &vai::Workers::ahead, &vai::Workers::set_ahead);
}

// The thread pool, made only when asked for.
#include "core/workers.h"

#include "bind/bind.h"

namespace nb = nanobind;

void bind_workers(nb::module_& m) {
  nb::class_<vai::Workers>(m, "Workers")
      .def(nb::init<int>(), nb::arg("threads"))
      .def_prop_ro("threads", &vai::Workers::count);
}

// The thread pool, made only when asked for.
#include "core/workers.h"

#include <stdexcept>

#include "bind/bind.h"

namespace nb = nanobind;

void bind_workers(nb::module_& m) {
  nb::class_<vai::Workers>(m, "Workers")
      .def("__init__",
           [](vai::Workers* self, int threads) {
             if (threads < 1 || threads > 1024) throw std::invalid_argument("1 to 1024 threads");
             new (self) vai::Workers(threads);
           })
      .def_prop_ro("threads", &vai::Workers::count);
}

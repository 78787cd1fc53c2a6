// The executor's Python module. Each part binds itself in its own file; this one only lists them.
#include <nanobind/nanobind.h>

#include "bind/bind.h"

NB_MODULE(_native, m) {
  m.doc() = "VAI's native executor.";
  bind_isa(m);
  bind_workers(m);
  bind_plan(m);
  bind_sample(m);
  bind_ceilings(m);
}

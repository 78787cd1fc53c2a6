// The executor's Python module. Each operation binds itself in its own file; this one only lists them.
#include <nanobind/nanobind.h>

NB_MODULE(_native, m) { m.doc() = "VAI's native executor."; }

// The parts of the Python module.
#pragma once

#include <nanobind/nanobind.h>

#include "vai/ops.h"

void bind_isa(nanobind::module_& m);
void bind_workers(nanobind::module_& m);
void bind_plan(nanobind::module_& m);
void bind_sample(nanobind::module_& m);
void bind_ceilings(nanobind::module_& m);

// The implementations of an instruction set by its name; throws ValueError for one this machine does not have.
const vai::Isa& isa_by_name(const char* name);

# `make demo` and `make test` are all a newcomer needs; both create the environment in .venv and build the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test build lint sanitize arm64 clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

# Build requirements live in the environment so that a rebuild compiles only what changed.
$(VENV)/.ready: $(BIN)/python pyproject.toml
	$(BIN)/pip install -q "scikit-build-core>=0.11" "nanobind>=2.9" cmake ninja
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

build: $(VENV)/.ready
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .

demo: build
	$(BIN)/vai bench switch --demo

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Sources are compiled once, and not by each of the hundreds of processes that tests start where Python may not write
# (PYTHONDONTWRITEBYTECODE).
test: lint
	$(BIN)/python -m compileall -q vai
	$(BIN)/pytest -n 2 --dist worksteal

# The kernels as a program of their own (tests/native/kernels.cc): under sanitizers, and on another processor. On x86-64 it has
# those of AVX2, and of AVX-512 and AMX with their instructions emulated; threads are watched over the portable ones.
OUT := build
PORTABLE := tests/native/kernels.cc csrc/core/plan.cc csrc/core/workers.cc csrc/core/lease.cc \
	$(wildcard csrc/ops/fast/*portable.cc) $(filter-out csrc/ops/ceilings/%,$(wildcard csrc/ops/*/scalar.cc))
WIDE := $(filter-out csrc/ops/ceilings/%,$(wildcard csrc/ops/*/avx2.cc csrc/ops/*/avx512.cc csrc/ops/*/*amx.cc))
HEADERS := $(wildcard csrc/core/*.h csrc/include/vai/*.h csrc/ops/*/*.h tests/native/emulated/*.h tests/native/emulated/ops/fast/*.h)
FLAGS := -std=c++20 -g1 -O1 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi -Icsrc -Icsrc/include -pthread
EMULATED := -iquote tests/native/emulated -Itests/native/emulated -Wno-maybe-uninitialized
KERNELS := $(if $(filter x86_64,$(shell uname -m)),$(PORTABLE) $(WIDE),$(PORTABLE))
WITH_WIDE := $(if $(filter x86_64,$(shell uname -m)),-DVAI_EMULATED)

comma := ,
# $(1): name, $(2): compiler, $(3): flags, $(4): sources
define program
$(OUT)/kernels-$(1): $(patsubst %.cc,$(OUT)/$(1)/%.o,$(4))
	$(2) $(3) -pthread $$^ -o $$@
$(OUT)/$(1)/%.o: %.cc $(HEADERS)
	@mkdir -p $$(@D)
	$(2) $(FLAGS) $(3) $$(if $$(filter %/avx2,$$*),-mavx2 -mf16c) $$(if $$(filter %avx512 %amx,$$*),$(EMULATED)) -c $$< -o $$@
endef
$(eval $(call program,plain,$(CXX),$(WITH_WIDE),$(KERNELS)))
$(eval $(call program,address,$(CXX),$(WITH_WIDE) -O0 -fsanitize=address$(comma)undefined -fno-sanitize-recover=all,$(KERNELS)))
$(eval $(call program,thread,$(CXX),-O0 -fsanitize=thread,$(PORTABLE)))
$(eval $(call program,arm64,aarch64-linux-gnu-g++,-static,$(PORTABLE)))

sanitize: $(OUT)/kernels-address $(OUT)/kernels-thread
	$(OUT)/kernels-address
	TSAN_OPTIONS=halt_on_error=1 $(OUT)/kernels-thread

# Needs g++-aarch64-linux-gnu and qemu-user: the same bits on another processor.
arm64: $(OUT)/kernels-plain $(OUT)/kernels-arm64
	test "$$($(OUT)/kernels-plain)" = "$$(qemu-aarch64 $(OUT)/kernels-arm64)"

clean:
	rm -rf $(VENV) build dist

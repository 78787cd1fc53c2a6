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

# The portable path as a program of its own (tests/native/portable.cc): under sanitizers, and on another processor.
PORTABLE := tests/native/portable.cc csrc/core/plan.cc csrc/core/workers.cc csrc/core/lease.cc \
	csrc/ops/fast/narrow.cc $(wildcard csrc/ops/fast/*portable.cc) $(filter-out csrc/ops/ceilings/%,$(wildcard csrc/ops/*/scalar.cc))
PORTABLE_FLAGS := -std=c++20 -g -O1 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi -Icsrc -Icsrc/include -pthread

build/portable-%: $(PORTABLE) $(wildcard csrc/core/*.h csrc/include/vai/*.h csrc/ops/*/*.h)
	@mkdir -p build
	$(PORTABLE_CXX) $(PORTABLE_FLAGS) $(PORTABLE_EXTRA) $(PORTABLE) -o $@

build/portable-plain build/portable-address build/portable-thread: PORTABLE_CXX = $(CXX)
build/portable-address: PORTABLE_EXTRA = -O0 -fsanitize=address,undefined -fno-sanitize-recover=all
build/portable-thread: PORTABLE_EXTRA = -fsanitize=thread
build/portable-arm64: PORTABLE_CXX = aarch64-linux-gnu-g++
build/portable-arm64: PORTABLE_EXTRA = -static

sanitize: build/portable-address build/portable-thread
	build/portable-address
	TSAN_OPTIONS=halt_on_error=1 build/portable-thread

# Needs g++-aarch64-linux-gnu and qemu-user: the same bits on another processor.
arm64: build/portable-plain build/portable-arm64
	test "$$(build/portable-plain)" = "$$(qemu-aarch64 build/portable-arm64)"

clean:
	rm -rf $(VENV) build dist

# `make demo` and `make test` are all a newcomer needs; both create the environment in .venv and build the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test build lint clean
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

# What fails is run once more, and both runs are shown: the tests start and kill real processes on machines that are shared,
# and a failure that does not repeat should be seen without stopping everybody.
test: lint
	$(BIN)/pytest || $(BIN)/pytest --last-failed

clean:
	rm -rf $(VENV) build dist

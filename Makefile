# Everything a person or CI runs here. Each target does its own set-up, from nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL ?=
PORT ?= 8000
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILT := build dist *.egg-info kernels/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
# What an editable install compiles or reads; the stamps below are remade when it changes.
SOURCES := pyproject.toml setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

# The script's folder stays off sys.path, so `kernels` and `engine` are only ever found inside `foveate`.
export PYTHONSAFEPATH := 1

.PHONY: help venv setup demo serve test check fix docs bench peers compat wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: MODEL (bundled name, directory or hub name), PORT (8000), PYTHON (python3, 3.11 or newer).\n'

# One stamp per set of packages: serving needs the fewest.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python {sys.version.split()[0]} is too old: set PYTHON to 3.11 or newer")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.runtime: $(SOURCES) .venv/.python
	$(PIP) install -q -e .
	@touch $@

.venv/.demo: $(SOURCES) .venv/.python
	$(PIP) install -q -e '.[demo]'
	@touch $@

.venv/.installed: $(SOURCES) .venv/.python
	$(PIP) install -q -e '.[dev]'
	@touch $@ .venv/.runtime .venv/.demo

venv: .venv/.installed ## Make .venv with all that development needs

setup: venv ## The same as venv

demo: .venv/.demo ## Start the server, ask about a picture at full and at a quarter of the budget, stop it
	$(BIN)/python tools/demo.py $(MODEL)

serve: .venv/.runtime ## Serve MODEL (the bundled tiny LLaVA unless set) on PORT
	$(BIN)/foveate serve $(MODEL) --port $(PORT)

test: .venv/.installed ## Run the whole test suite
	$(BIN)/python -m pytest

check: .venv/.installed ## Lint, formatting and types, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --exclude bench/compat/clients bench tools/demo.py tools/methods_page.py tools/usage_page.py

fix: .venv/.installed ## Repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.installed ## Write docs/methods.md and the table of docs/usage.md
	$(BIN)/python tools/methods_page.py
	$(BIN)/python tools/usage_page.py

# `-m bench...` finds the folder `bench` through the working directory, which PYTHONSAFEPATH hides.
bench: .venv/.installed ## Measure quality at each budget, latency, throughput, host overhead: bench/results (takes long)
	env -u PYTHONSAFEPATH $(BIN)/python -m bench.quality
	env -u PYTHONSAFEPATH $(BIN)/python -m bench.quality --timing 5
	env -u PYTHONSAFEPATH $(BIN)/python -m bench.reducers_cost
	env -u PYTHONSAFEPATH $(BIN)/python -m bench.serve
	env -u PYTHONSAFEPATH $(BIN)/python -m bench.host

peers: .venv/.installed ## Measure beside the peers whose environments are in .peers (takes long; see bench/peers)
	env -u PYTHONSAFEPATH $(BIN)/python -m bench.peers
	$(PIP) install -q -e '.[bench]'
	env -u PYTHONSAFEPATH $(BIN)/python -m bench.scaling

compat: .venv/.installed ## Try clients, checkpoint layouts and picture formats: docs/compatibility.md (needs npm)
	env -u PYTHONSAFEPATH $(BIN)/python -m bench.compat --install

wheel: .venv/.python ## Build the wheel into dist/
	$(PIP) wheel -q --no-deps -w dist .
	@ls dist/*.whl

clean: ## Remove the virtual environment and everything built
	rm -rf .venv $(BUILT)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

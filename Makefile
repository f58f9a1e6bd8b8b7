# Every target sets up what it needs: a virtual environment in .venv with the pinned packages, made on first use and made
# again only when pyproject.toml or constraints.txt changes. `make PYTHON=/path/to/python3.11 ...` picks the interpreter;
# `make ARGS="..." TARGET` passes options on to sluice, pytest or the benchmarks.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint format bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install Sluice, editable, with the pinned packages

# The mark is stamped before the installation starts and moved into place after it ends: an interrupted installation leaves
# no mark, and a pin that changed meanwhile makes the mark old.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 "make: Sluice needs Python 3.11 or newer, found '$(PYTHON)': pass PYTHON=/path/to/python3.11"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@touch $@.began
	@echo "make: installing into $(VENV) (the first time takes minutes and several GB)"
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@mv $@.began $@

demo: $(STAMP) ## Run everything on a small made-up world, on this machine's CPU
	$(BIN)/sluice demo $(ARGS)

test: $(STAMP) ## One case a mechanism; under 15 minutes on two cores
	$(PYTEST) -m "not full" $(ARGS)

test-full: $(STAMP) ## Matrices, kills and the guides' own commands; under 35 minutes on two cores
	$(PYTEST) -m full $(ARGS)

lint: $(STAMP) ## ruff (rules and layout) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Lay out the code as ruff does
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Every benchmark, then a table of claims; ARGS=--quick for under a minute each
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/run_all.py $(ARGS)

clean: ## Remove caches, build leftovers and the demo's output (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

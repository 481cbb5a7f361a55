# Each target works in a clean clone: it makes the virtual environment .venv, installs what it needs and runs.
# Requires Python 3.11 or newer with the venv module.
#
#   make quickstart   train and evaluate a small model, offline, within minutes on a CPU
#   make test         the quick tests
#   make slow         the slow tests, which `make test` skips
#   make lint         ruff (rules and format) and mypy
#   make docs         the documentation as a site, in site/
#   make clean        remove .venv and the caches
#
# For another interpreter: make test PYTHON=/path/to/python3.12

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
    $(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed

# Packages of another environment must not hide a missing install step.
unexport PYTHONPATH
unexport PYTHONHOME
unexport VIRTUAL_ENV
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Keeps the memory of XLA's buffers between steps: they are equally large in each, and returning the memory makes
# the system clear it every time (glibc on Linux; no effect elsewhere).
export GLIBC_TUNABLES := glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help install quickstart test slow lint docs clean

help:
	@sed -n 's/^#   //p' Makefile

quickstart: $(INSTALLED)
	$(BIN)/trbert train --config configs/quickstart.yaml

test: $(INSTALLED)
	$(PYTEST) --dist loadfile  # a file's tests share compiled programs

slow: $(INSTALLED)
	$(PYTEST) --dist worksteal -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d site/.doctrees . site
	@echo "open site/index.html"

install: $(INSTALLED)

clean:
	rm -rf $(VENV) site docs/reference .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): setup.cfg pyproject.toml $(CREATED)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: no $(PYTHON) here; install Python 3.11 or newer, or name one: make ... PYTHON=/path/to/python" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) --version 2>&1`;" \
	        "name another: make ... PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# `make demo` and `make test` are all a fresh machine needs; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up

.PHONY: help setup demo test slow check bench docs clean
help:
	@echo "make demo    train a CNN on real digits with two Ray workers, and write its report"
	@echo "make test    run every test that this machine can run"
	@echo "make slow    accuracy runs of the recipes (many minutes)"
	@echo "make check   ruff, mypy, import-linter"
	@echo "make bench   speed against plain PyTorch, DataLoader, torchrun and Ray, one JSON line each"
	@echo "make docs    the pages in docs/ and a reference of what is called from Python, in build/docs"

setup: $(SETUP)
$(SETUP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(SETUP)

demo: setup
	$(BIN)/manta train digits-cnn --workers 2

test: setup
	$(BIN)/python -m pytest -m "not slow"

slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m tests.benchmarks $(NAMES)

docs: setup
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) build *.egg-info

# Two commands matter: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-long test-accounting check fix clean

demo: $(VENV)/.installed
	$(BIN)/hpc-workspace demo

test: check
	$(BIN)/python -m pytest -m "not long and not accounting"

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not accounting"

# Starts the test cluster anew with accounting, and leaves it as it was.
test-accounting: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m accounting tests/integration

check: $(VENV)/.installed-dev
	$(BIN)/ruff check hpc_workspace tests examples benchmarks
	$(BIN)/ruff format --check hpc_workspace tests examples benchmarks
	$(BIN)/mypy

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix hpc_workspace tests examples benchmarks
	$(BIN)/ruff format hpc_workspace tests examples benchmarks

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) dist build

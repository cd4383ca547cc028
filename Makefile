# Two commands matter: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# OpenHands' SDK wants a Python of its own and some 190 wheels, which all checkouts of one user share.
OPENHANDS ?= /var/tmp/hpc-workspace-openhands-$(shell id -u)
PYTHON312 ?= $(shell for python in python3 python3.14 python3.13 python3.12 \
	$$(pyenv root 2>/dev/null)/versions/3.1[2-9]*/bin/python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)
DEPENDENCIES := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["dependencies"], *p["optional-dependencies"]["openhands"], "pytest>=8", sep="\n")

.PHONY: demo test test-long test-accounting test-openhands bench check fix clean

demo: $(VENV)/.installed
	$(BIN)/hpc-workspace demo

test: check
	$(BIN)/python -m pytest --durations=40 --durations-min=5 -m "not long and not accounting"

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not accounting"

# Starts the test cluster anew with accounting, and leaves it as it was.
test-accounting: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m accounting tests/integration

# The unit tests of integrations/openhands.py, with the newest SDK that the extra allows.
test-openhands:
	@test -n "$(PYTHON312)" || { echo "it needs Python >= 3.12: make $@ PYTHON312=/path/to/python3"; exit 1; }
	@mkdir -p -m 0700 $(OPENHANDS) && test -O $(OPENHANDS) || { echo "$(OPENHANDS) is not yours"; exit 1; }
	test -x $(OPENHANDS)/bin/python || $(PYTHON312) -m venv $(OPENHANDS)
	$(OPENHANDS)/bin/python -c '$(DEPENDENCIES)' >$(OPENHANDS)/requirements.txt
	$(OPENHANDS)/bin/pip install --quiet --disable-pip-version-check --upgrade -r $(OPENHANDS)/requirements.txt
	OPENHANDS_SUPPRESS_BANNER=1 $(OPENHANDS)/bin/python -m pytest tests/unit/test_openhands.py

# Every row beside its floor, peers and goal, on the test cluster, into build/; some rows: make bench ROWS='ssh-* help'
bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.harness.on_cluster '$(ROWS)'

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

# make test | test-all | test-long | demo | benchmark-small | lint | types | clean
#
# Each target makes its own environment; no other one is touched. PYTHON=python3.12 chooses the interpreter
# (3.10 or newer), and pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured.

PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS := pyproject.toml constraints.txt
# A stamp per Python version: another PYTHON= remakes the environment, and so does a change of the pins.
TEST_STAMP := $(VENV)/.test-$(VERSION)
DEV_STAMP := $(VENV)/.dev-$(VERSION)
DEMO_STAMP := $(DEMO_VENV)/.demo-$(VERSION)

.DEFAULT_GOAL := test
.PHONY: test test-all test-long demo benchmark-small lint types format clean python

test: $(TEST_STAMP)
	$(VENV)/bin/python -m pytest

test-all: $(TEST_STAMP)
	$(VENV)/bin/python -m pytest -m "not long"

test-long: $(TEST_STAMP)
	$(VENV)/bin/python -m pytest -m long

demo: $(DEMO_STAMP)
	$(DEMO_VENV)/bin/metaopt experiment=digits
	$(DEMO_VENV)/bin/metaopt

# Asserts that every contestant ran, and bounds on flops and errors; never a time.
benchmark-small: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python experiments/benchmark/run.py --small

lint: $(DEV_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: $(DEV_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(DEV_STAMP)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist .pytest_cache .ruff_cache

python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("metaopt needs Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'

$(TEST_STAMP): $(PINS) | python
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

$(DEV_STAMP): $(TEST_STAMP)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(DEMO_STAMP): $(PINS) | python
	$(PYTHON) -m venv --clear $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install -c constraints.txt -e .
	touch $@

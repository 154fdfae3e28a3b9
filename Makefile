# `make demo` does the main job, `make test` checks everything, `make docs` builds the pages. Each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-warn-script-location --no-compile -q -c .ci/constraints.txt
# Where the environment forbids it, every process would compile all of torch's Python anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test docs clean

demo:
	@started=$$(date +%s) && $(MAKE) -s .venv/.demo && $(BIN)/python -m scripts.demo started=$$started

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

docs: .venv/.docs
	@$(BIN)/python -m scripts.docs.build

.venv/.demo: pyproject.toml .ci/constraints.txt | .venv/bin/python
	@echo "installing torch and a few small packages into .venv ..."
	@$(PIP) -e '.[demo]'
	@touch $@

.venv/.docs: pyproject.toml .ci/constraints.txt | .venv/bin/python
	@echo "installing what the documentation is built with into .venv ..."
	@$(PIP) -e '.[docs]'
	@touch $@

.venv/.dev: pyproject.toml .ci/constraints.txt | .venv/bin/python
	@echo "installing everything for development into .venv ..."
	@$(PIP) -e '.[dev]'
	@touch $@ .venv/.demo .venv/.docs

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python >= 3.11 is needed, this is " + sys.version)'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Every set-up, test and check of the project. `make quickstart` and `make test` work on a fresh machine with Python 3.11.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet
SETUP := pyproject.toml constraints.txt

CPP := $(wildcard src/crossvit/fast/native/*.cpp src/crossvit/fast/native/*.h)

TWINS := tests/fast tests/model tests/engines/test_engines.py

.PHONY: help quickstart test test-all check docs seal format bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

quickstart: $(VENV)/.installed  ## install, train on real scans, evaluate, predict, write a report
	@$(BIN)/python examples/quickstart.py

test: $(VENV)/.installed-test  ## the tests CI runs
	$(BIN)/python -m pytest -n 2 -m "not slow and not alone"
	$(BIN)/python -m pytest -m alone

test-all: $(VENV)/.installed-test  ## those and the long ones
	$(BIN)/python -m pytest -n 2 -m "not alone"
	$(BIN)/python -m pytest -m alone

check: $(VENV)/.installed-check  ## format, lint, types and the rooms' import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs  ## the documentation as a site in site/, the reference made from the docstrings; a broken link is an error
	$(BIN)/zensical build --strict

seal: $(VENV)/.installed-test  ## accept edited functions of model/, if every fast form still equals them
	cp src/crossvit/fast/seal.json .seal.before
	$(BIN)/python -m crossvit.fast.seal
	$(BIN)/python -m pytest -n 2 -m "not slow" $(TWINS) || (mv .seal.before src/crossvit/fast/seal.json; exit 1)
	rm .seal.before

format: $(VENV)/.installed-check  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix .

NAME ?= list
bench: $(VENV)/.installed  ## a benchmark: make bench NAME=attention ARGS="..."; alone, their list
	@$(BIN)/python benchmarks/run.py $(NAME) $(ARGS)

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crossvit needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SETUP) | $(VENV)/bin/python
	@echo "installing into $(VENV) (torch is large: about two minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(SETUP) | $(VENV)/.installed
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.installed-check: $(SETUP) | $(VENV)/.installed
	@$(PIP) -e '.[check]'
	@touch $@

$(VENV)/.installed-docs: $(SETUP) | $(VENV)/.installed
	@$(PIP) -e '.[docs]'
	@touch $@

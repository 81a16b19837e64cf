# Every set-up, test and check of the project. `make quickstart` and `make test` work on a fresh machine with Python 3.11.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet
SETUP := pyproject.toml constraints.txt

CPP := $(wildcard src/crossvit/fast/native/*.cpp src/crossvit/fast/native/*.h)

TWINS := tests/fast tests/model tests/engines/test_engines.py

.PHONY: help quickstart test test-all check docs seal format bench bench-cold bench-levers bench-startup bench-attention bench-fusion bench-train bench-small bench-checkpoints bench-loader bench-predict clean

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

bench: $(VENV)/.installed  ## both models against timm through every engine installed: a table, bench/bench.json, bench/bench.svg
	$(BIN)/crossvit bench --out bench

bench-cold: $(VENV)/.installed  ## the first prediction of one PNG, from the shell, against timm in a script and ONNX Runtime
	$(BIN)/python benchmarks/coldstart.py

bench-levers: $(VENV)/.installed  ## what each change of the inference form on a CPU gives
	$(BIN)/python benchmarks/levers.py

bench-startup: $(VENV)/.installed  ## time of `crossvit --help` beyond a bare interpreter
	$(BIN)/python benchmarks/startup.py

bench-attention: $(VENV)/.installed  ## fused against plain attention on this machine
	$(BIN)/python benchmarks/attention.py

bench-fusion: $(VENV)/.installed  ## lazy against materialised keys and values: time and peak memory
	$(BIN)/python benchmarks/fusion.py

bench-train: $(VENV)/.installed  ## a training step of ours against timm's
	$(BIN)/python benchmarks/training.py

bench-checkpoints: $(VENV)/.installed  ## what writing checkpoints adds to training
	$(BIN)/python benchmarks/checkpoints.py

DATA ?= caltech101_subset_160
bench-loader: $(VENV)/.installed  ## images a second against torchvision's ImageFolder: make bench-loader DATA=folder
	$(BIN)/python benchmarks/loader.py $(DATA)

RUN ?= runs/signs
bench-predict: $(VENV)/.installed  ## memory and images a second of prediction into a file: make bench-predict RUN=run DATA=folder
	$(BIN)/python benchmarks/prediction.py $(RUN) $(DATA)

PACKS ?= sign_digits_64 cifar10_subset
bench-small: $(VENV)/.installed  ## from scratch on few photos against resnet18 and vit_tiny: make bench-small PACKS="folder folder"
	$(BIN)/python benchmarks/small.py $(PACKS)

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

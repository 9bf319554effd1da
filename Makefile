# Commands for installing, testing and trying dsmr. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= runs

.DEFAULT_GOAL := help
.PHONY: help install demo test lint type bench reliability

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Create a virtual environment in .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("dsmr needs Python 3.11 or newer; run make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,app]'
	@touch $@

demo: install ## Train two small models on generated pieces and compare their recall (two minutes)
	$(BIN)/python experiments/demo/run.py --root $(RUNS)

test: install ## Run all tests but the slow ones; skips tests that need MAESTRO or a GPU
	$(BIN)/python -m pytest

lint: install ## Check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: install ## Check types
	$(BIN)/mypy

bench: install ## Install the peers and benchmark against them (a quarter of an hour on two cores)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@mkdir -p $(RUNS)
	$(BIN)/dsmr benchmark --config benchmark_cpu --output $(RUNS)/benchmark.json

reliability: install ## Run the slow tests: lost work, bad files, two processes (ten minutes on two cores)
	$(BIN)/python -m pytest -m slow -n 0 -v

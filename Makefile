# On a fresh machine `make demo` and `make test` do everything, set-up included.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: .venv demo test test-all check bench architectures wheel

.venv: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

# The main job on a real model: the same tokens, and how much faster they come.
demo: $(READY)
	$(BIN)/specdec demo

# Two workers of one thread each: models as small as the tests' own only lose by more.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python benchmarks/figures.py --check

# For a machine that does nothing else meanwhile; about 20 minutes on two cores.
bench: $(READY)
	mkdir -p benchmarks/results
	$(BIN)/specdec bench --max-new-tokens 64 --repeats 1 --json benchmarks/results/demo.json
	$(BIN)/python benchmarks/figures.py

architectures: $(READY)
	$(BIN)/python benchmarks/architectures.py

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build

# On a fresh machine `make demo` and `make test` do everything, set-up included.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
METHODS := plain,plain+kernels,auto,auto+kernels,suffix+kernels,recycling+kernels,prompt-lookup,prompt-lookup+kernels,compiled,assisted,economize,flashspec

.PHONY: .venv browser demo test test-all check bench bench-cost bench-hindsight bench-agents bench-questions bench-drafts bench-long architectures gpu wheel

.venv: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps langchain-huggingface lm-eval
	touch $(READY)

# The main job on a real model: the same tokens, and how much faster they come.
demo: $(READY)
	$(BIN)/specdec demo

# What the tests of the report's page look at it with; they are skipped where it cannot be installed.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { command -v apt-get >/dev/null && \
	  [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } || \
	  echo "no Chromium here: the tests that need one are skipped"

# Two workers of one thread each: models as small as the tests' own only lose by more.
test: $(READY) browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow" --durations=25

test-all: $(READY) browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python benchmarks/figures.py --check

# For a machine that does nothing else meanwhile; about 40 minutes on two cores, and it goes on where it was stopped.
# Rivals that cannot be imported are left out: pip install --no-deps --target DIR economize flashspec, then
# PYTHONPATH=DIR make bench. DRAFT=PATH adds bench-drafts.
bench: $(READY)
	mkdir -p benchmarks/results artefacts
	$(BIN)/specdec bench --max-new-tokens 64 --prompts-per-workload 2 --repeats 2 --time-cap 25 --methods $(METHODS) \
	  --json benchmarks/results/demo.json --runs artefacts/demo.runs.jsonl \
	  --html artefacts/demo.html --trace artefacts/demo.trace.jsonl
	$(BIN)/python benchmarks/figures.py
	$(if $(DRAFT),$(MAKE) bench-drafts)

# What a pass costs beside what reading the weights would take; for a machine that does nothing else meanwhile; about
# ten minutes.
bench-cost: $(READY)
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/cost.py --processes 9 --json benchmarks/results/cost.json
	$(BIN)/python benchmarks/figures.py

# The default against the best fixed drafter and size for each kind of work; about half an hour.
bench-hindsight: $(READY)
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/hindsight.py --json benchmarks/results/hindsight.json
	$(BIN)/python benchmarks/figures.py

# Sessions, the pool and other libraries on top: what they gain end to end; about a quarter of an hour.
# TRACES=FILE,FILE adds recorded conversations.
bench-agents: $(READY)
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/sessions.py --repeats 2 --turns 5 --json benchmarks/results/sessions.json
	$(if $(TRACES),$(BIN)/python benchmarks/sessions.py --agents "" --traces $(TRACES) --turns 5 --max-new-tokens 64 \
	  --repeats 1 --json benchmarks/results/traces.json)
	$(BIN)/python benchmarks/pool.py --repeats 1 --json benchmarks/results/pool.json
	$(BIN)/python benchmarks/integrations.py --repeats 1 --json benchmarks/results/integrations.json
	$(BIN)/python benchmarks/figures.py

# Questions of others, QUESTIONS=FILE.jsonl, whose texts are not kept; SOURCE says whose they are.
bench-questions: $(READY)
	mkdir -p benchmarks/results artefacts
	$(BIN)/specdec bench --questions $(QUESTIONS) --max-new-tokens 64 --prompts-per-workload 2 --repeats 1 \
	  --methods plain,plain+kernels,auto+kernels,prompt-lookup+kernels --json artefacts/questions.json
	$(BIN)/python benchmarks/without_texts.py artefacts/questions.json "$(SOURCE)" --json benchmarks/results/questions.json
	$(BIN)/python benchmarks/figures.py

# A trained draft, DRAFT=PATH: lengths, trees and temperatures, beside transformers' assisted generation.
bench-drafts: $(READY)
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/drafts.py --draft $(DRAFT) $(DRAFT_OPTIONS) --json benchmarks/results/drafts.json
	$(BIN)/python benchmarks/figures.py

# Caches of long texts, and what TriForce makes of them; about ten minutes.
bench-long: $(READY)
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/long_context.py --json benchmarks/results/long_context.json
	$(BIN)/python benchmarks/long_documents.py --json benchmarks/results/long_documents.json
	$(BIN)/python benchmarks/figures.py

# GPU tests and timings in one command, with the Python that is there; not yet run on a GPU.
gpu:
	$(PYTHON) benchmarks/gpu.py

architectures: $(READY)
	$(BIN)/python benchmarks/architectures.py

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build

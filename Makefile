# One word per habit. Each target does its own set-up and is quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
READY  := $(VENV)/.ready

.PHONY: help demo test test-all properties check lint types fmt docs bench chaos fuzz servers clean

SECONDS ?= 60
# Of `make chaos`: a factor on its faults, and of what there must be so many, as requests=5000.
INTENSITY ?= 1
LEAST ?=
# Processes that share the tests, a thread each.
TESTERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TESTERS) --dist loadscope --no-loadscope-reorder

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time: torch is large)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenmill needs Python >= 3.11, got " + sys.version.split()[0] + "; run: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt pip setuptools torch
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[worker,embedded,dev]'
	@touch $@

demo: $(READY)   ## answer examples/questions.jsonl with a real model, live
	@examples/demo.sh

test: lint types $(READY)   ## lint, types, and every quick test that needs no GPU
	@$(PYTEST) -m 'not gpu and not slow'

test-all: lint types $(READY)  ## the slow ones too, on every kind of server
	@TOKENMILL_SCHEDULES=12000 $(PYTEST) -m 'not gpu' --all-servers

properties: $(READY)  ## 12,000 random schedules instead of 500
	@TOKENMILL_SCHEDULES=12000 $(BIN)/pytest -q tests/engine/test_scheduler_properties.py

lint: $(READY)   ## ruff and the import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: $(READY)  ## mypy strict
	@$(BIN)/mypy

fmt: $(READY)    ## format and fix what can be fixed
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: $(READY)   ## write the tables that are made from the tests
	@UPDATE_DOCS=1 $(BIN)/pytest -q tests/engine/test_families.py -k docs

bench: $(READY)  ## the CPU benches, as JSON in bench/results
	@$(BIN)/python bench/queue_overhead.py

chaos: $(READY)  ## kill, stop, cut and restart everything for SECONDS=60, by SEED=, and check; LOSSY=1: restarts lose the last moments; SERVERS=sentinel or cluster: primaries die
	@$(BIN)/python tests/chaos/suite.py --seconds $(SECONDS) --seed "$(SEED)" --intensity $(INTENSITY) \
	    --least "$(LEAST)" --output $(if $(SERVERS),bench/results/chaos_$(SERVERS).json --servers $(SERVERS),$(if $(LOSSY),bench/results/chaos_lossy.json --lossy,bench/results/chaos.json))

fuzz: $(READY)   ## 100,000 malformed requests against a worker
	@$(BIN)/python tests/fuzz/fuzz_inbox.py --count 100000 --seed "$(SEED)"

servers: $(READY) ## the tests of the protocol alone, behind Sentinels and on clusters
	@$(BIN)/pytest -m everywhere --all-servers

clean:           ## remove everything that make created
	@rm -rf $(VENV) build dist .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis

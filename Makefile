.DEFAULT_GOAL := help
.PHONY: help setup test unit lint format model demo demo-seeds poems demo-poems demo-poems-seeds tiny chaos lock

PYTHON := $(shell for p in python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
RECIPE := configs/recipes/smollm2_cpu.yaml
POEMS := configs/recipes/tang_poems.yaml

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: ## make .venv from the lock, once
	@test -n "$(PYTHON)" || { echo "FAILED: no Python 3.11 on the PATH. Install it with its headers: apt-get install python3.11 python3.11-venv python3.11-dev"; exit 1; }
	@$(PYTHON) -m requirements.install

test: setup ## run all tests, or TESTS="those named"
	@$(BIN)/python -m pytest $(or $(TESTS),-n 2 --dist loadscope --durations=25)

unit: setup ## run the tests that start no engine
	@$(BIN)/python -m pytest -m "not ray and not vllm and not engine and not browser and not multinode" $(TESTS)

lint: setup ## check format, lint, types and the floors
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: setup ## format the code and sort its imports
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

model: setup ## fetch the demo's model and text, once
	@$(BIN)/python -m requirements.model

demo: model ## align SmolLM2-135M on this machine, from prompts to a judged policy
	@$(BIN)/tenfold run $(RECIPE)

demo-seeds: model ## the demo with three seeds, judged on 100 held-out prompts
	@for seed in 0 1 2; do \
		$(BIN)/tenfold run $(RECIPE) name=smollm2-seed-$$seed seed=$$seed evaluate.num_prompts=100 || exit $$?; \
	done

poems: setup ## fetch the Tang poems, once
	@$(BIN)/python -m requirements.poems

demo-poems: poems ## from nothing to aligned: a small Chinese GPT that writes poems of the form it is asked for
	@$(BIN)/tenfold run $(POEMS)
	@$(BIN)/python -m benchmarks.poems runs/tang-poems

demo-poems-seeds: poems ## the same with three seeds
	@for seed in 0 1 2; do \
		$(BIN)/tenfold run $(POEMS) name=tang-poems-seed-$$seed seed=$$seed || exit $$?; \
		$(BIN)/python -m benchmarks.poems runs/tang-poems-seed-$$seed || exit $$?; \
	done

tiny: setup ## write a model of random weights for configs/recipes/tiny_cpu.yaml
	@test -d models/tiny || $(BIN)/python -m tests.tiny models/tiny

chaos: tiny ## kill -9 a small run five times, resume it, and compare it with the undisturbed one
	@$(BIN)/tenfold chaos configs/recipes/tiny_cpu.yaml --kills 5

lock: setup ## resolve both locks again from pyproject.toml
	@$(BIN)/python -m requirements.lock

# Every target sets up what it needs: Python 3.12 and PyPI are enough.
#   make train                         the main job: train, evaluate, sample (TransNormerLLM)
#   make train ARGS="--preset transformer"      the same with softmax attention
#   make test | lint | format | test-gpu | readme | pages | lock | wheel | clean

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Extra requirements of the project to install beside the lock file: tpu or cuda.
EXTRA ?=
STAMP := $(VENV)/.installed$(EXTRA:%=-%)
WORKERS ?= 2
# Processes that share a GPU; 0 for none but pytest's own.
GPU_WORKERS ?= 4

.PHONY: help train test test-gpu lint format lock wheel readme pages clean env

help:
	@sed -n 's/^#   //p' Makefile

env: $(STAMP)

$(STAMP): requirements.lock pyproject.toml setup.cfg scripts/find_python.sh
	@set -e; python=$$(bash scripts/find_python.sh); \
	echo "setting up $(VENV) with $$python ($$($$python --version)); this is done once"; \
	rm -rf $(VENV); \
	"$$python" -m venv $(VENV) || { echo "error: $$python cannot make virtual environments; install its venv module (Debian: apt install python3.12-venv)" >&2; exit 1; }; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	if [ -n "$(EXTRA)" ]; then $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRA)]"; fi; \
	touch $(VENV)/.installed $(STAMP)

train: $(STAMP)
	@$(BIN)/python -m experiments.quickstart $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# On a machine with a CUDA device, after `make EXTRA=cuda env`.
test-gpu: $(STAMP)
	@$(BIN)/python -m pytest -m gpu --device gpu -n $(GPU_WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# Resolves the lock file again from pyproject.toml.
lock: $(STAMP)
	@$(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip compile pyproject.toml --extra dev --universal \
	  --python-version 3.12 --generate-hashes --no-emit-index-url --no-header --upgrade --quiet \
	  --output-file requirements.lock && echo "requirements.lock written"

wheel: $(STAMP)
	@$(BIN)/python -m build --quiet --wheel --outdir dist . && ls dist

# Writes all that is made from the catalogue: the README's table and the pages of docs/mechanisms.
readme: pages
	@$(BIN)/python scripts/readme_tables.py

# ARGS=--figures draws the figures again that are there.
pages: $(STAMP)
	@$(BIN)/python scripts/mechanism_pages.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# Every target sets up what it needs. `make help` lists them.
PYTHON  ?= python3
VENV    ?= .venv
PY      := $(VENV)/bin/python
READY   := $(VENV)/.ready
DATA_DIR ?=
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 test test-fast lint bench clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## the pinned environment in .venv

# torch first: anything installed before it may pull another build.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(READY)  ## pretrain a tiny model, train it with PTE by GRPO, show what changed
	$(PY) recipes/demo.py --tier tiny

demo-smollm2: $(READY)  ## the same run on a real pretrained model and real rows (DATA_DIR=folder without a hub)
	$(PY) recipes/demo.py --tier smollm2 $(if $(DATA_DIR),--data_dir $(DATA_DIR))

test: $(READY)  ## all tests
	$(PY) -m pytest -n 2

test-fast: $(READY)  ## all tests that take less than a minute
	$(PY) -m pytest -n 2 -m "not slow"

lint: $(READY)  ## ruff, lint and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)  ## the benchmarks that run on a CPU
	$(PY) -m benchmarks.replay
	$(PY) -m benchmarks.rollout
	$(PY) -m benchmarks.probe

clean:  ## outputs and caches, not the environment
	rm -rf outputs .pytest_cache .ruff_cache .hypothesis

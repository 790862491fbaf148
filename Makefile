# Every target sets up what it needs. `make help` lists them.
PYTHON  ?= python3
VENV    ?= .venv
PY      := $(VENV)/bin/python
READY   := $(VENV)/.ready
DATA_DIR ?=
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-sums demo-smollm2 test test-all test-fast lint bench bench-gpu gpu-check clean report

help:  ## this list
	@grep -hE '^[a-zA-Z0-9%-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## the pinned environment in .venv

# Exactly the files of the locks, by their hashes (tools/lock.py writes them). Source packages are built by the
# setuptools of the lock. Where there is no GPU torch's build for CPUs is taken, if pip is told of a place that has it.
# Python compiles what is imported, when it is; pip would compile all of it.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
LOCKED := $(PIP) --require-hashes --no-build-isolation --use-pep517
TORCH := $(LOCKED) -r requirements-torch.lock
$(READY): $(wildcard requirements*.lock) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements-build.lock
	$(if $(shell command -v nvidia-smi),$(TORCH),$(LOCKED) -r requirements-torch-cpu.lock || $(TORCH))
	$(LOCKED) -r requirements.lock
	$(PIP) --no-build-isolation --editable .
	$(PY) -m pip check
	touch $@

demo: $(READY)  ## what PTE recalls of what has left the cache, and LoRA does not; about five minutes
	$(PY) -m experiments.demo --tier tiny

demo-sums: $(READY)  ## GRPO with PTE on running sums, a tiny model, before and after; about ten minutes
	$(PY) -m experiments.demo --tier sums

demo-smollm2: $(READY)  ## the same as demo-sums on a real pretrained model and real rows (DATA_DIR=folder without a hub)
	$(PY) -m experiments.demo --tier smollm2 $(if $(DATA_DIR),--data_dir "$(DATA_DIR)")

test: $(READY)  ## the tests; of large grids every value once
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(READY)  ## the same with every cell of the grids
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

test-fast: $(READY)  ## all tests that take less than a minute
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not thorough"

lint: $(READY)  ## ruff, lint and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)  ## the benchmarks, at the sizes that a CPU can do (RECORD= to leave docs/benchmarks as it is)
	$(PY) -m benchmarks.rollout --arms pte lora_c lora generate continuous $(RECORD)
	$(PY) -m benchmarks.replay $(RECORD)
	$(PY) -m benchmarks.step $(RECORD)
	$(PY) -m benchmarks.memory $(RECORD)
	$(PY) -m benchmarks.long $(RECORD)
	$(PY) -m benchmarks.capacity --shape qwen2.5-3b $(RECORD)
	$(PY) -m benchmarks.probe $(RECORD)

# The variables are for trying the same lines small, where there is no GPU.
GPU_FLAGS ?= --device cuda
bench-gpu: $(READY)  ## the same at the paper's sizes on one GPU
	$(PY) -m benchmarks.rollout --shape $(BIG) $(ROLLOUT_SIZE) $(GPU_FLAGS) $(RECORD)
	$(PY) -m benchmarks.replay --shape $(BIG) $(REPLAY_SIZE) $(GPU_FLAGS) $(RECORD)
	$(PY) -m benchmarks.step --shape $(BIG) $(STEP_SIZE) $(GPU_FLAGS) $(RECORD)
	$(PY) -m benchmarks.memory --shape $(BIG) $(MEMORY_SIZE) $(GPU_FLAGS) $(RECORD)
	$(PY) -m benchmarks.long --shape $(BIG) $(LONG_SIZE) $(GPU_FLAGS) $(RECORD)
	$(PY) -m benchmarks.capacity --shape $(BIG) $(CAPACITY_SIZE) $(GPU_FLAGS) $(RECORD)

# make gpu-check CHECK="--small --device cpu --out outputs/gpu-check" tries it where there is no GPU.
gpu-check: $(READY)  ## a GPU's first 20 minutes: is it right, how fast; report in docs/benchmarks/gpu/gpu_check.md
	$(PY) -m benchmarks.gpu_check $(CHECK)

RECORD ?= --record
BIG ?= qwen2.5-3b
ROLLOUT_SIZE ?= --batch 64 --prompt 512 --new-tokens 3072 --window 512
REPLAY_SIZE ?= --lengths 3072 16384 --prompt 512 --window 512
STEP_SIZE ?= --lengths 3072 16384 --prompt 512 --window 512
MEMORY_SIZE ?= --lengths 16384 32768 65536 --prompt 512 --window 512 --offload --arms "pte, segments"
LONG_SIZE ?= --batch 16 --prompt 512 --window 512 --cycles 4
CAPACITY_SIZE ?=

# ---- the paper's tables and figures -------------------------------------------------------------------------
# make plan-table1 shows what will run and what it costs, make reproduce-table1 runs it; likewise table2, table3,
# tableA1, figure3, figure4a, figure4b, figure5, figure6, figureA1, and all for all of them. Every training run and
# every evaluation is a target, so what is done is not done again.
#   SCALE=paper       the three real models on GPUs (the default where there are some); DATA_DIR=folder without a hub,
#                     GPUS=n for another number than are found
#   SCALE=night       one small model on one GPU, three seeds; NIGHT_MODEL=hub name or folder for another one
#   SCALE=tiny        a tiny model on generated sums, minutes on two cores
#   SCALE=night-tiny  tries the night with the tiny model
# MODELS, METHODS, BENCHMARKS and SEEDS leave runs out: make reproduce-table1 METHODS="lora_c pte" BENCHMARKS=math500
SCALE ?= $(if $(shell command -v nvidia-smi),paper,tiny)
ACCELERATE ?= accelerate_configs/$(if $(filter 1,$(GPUS)),single_gpu,ddp).yaml
export NIGHT_MODEL
FILTERS = --models "$(MODELS)" --methods "$(METHODS)" --benchmarks "$(BENCHMARKS)" --seeds "$(SEEDS)"

ifneq ($(filter %tiny,$(SCALE)),)
export OMP_NUM_THREADS ?= 1
LAUNCH := $(PY)
TRAIN_ARGS := --dataset_name outputs/tiny/data/train.jsonl
EVAL_ARGS := --data_dir outputs/tiny/data --temperature 1.0 --top_p 1.0 --batch_size 128 --use_cpu true
else
.NOTPARALLEL:  # one run uses every GPU
GPUS ?= $(or $(if $(filter night,$(SCALE)),1),$(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | wc -l)),8)
LAUNCH := $(VENV)/bin/accelerate launch --config_file $(ACCELERATE) --num_processes $(GPUS)
TRAIN_ARGS := $(if $(DATA_DIR),--data_dir "$(DATA_DIR)")
# $(call WITHIN_A_STEP,micro-batches,their size): so many, or all of a GPU's 512 / GPUS completions where these are fewer.
WITHIN_A_STEP = $(shell own=$$((512 / ($(2) * $(GPUS)))); echo $$(($(1) < own ? $(1) : own)))
# BATCH, completions that a GPU decodes at once, is the scale's.
EVAL_ARGS = --batch_size $(BATCH) $(if $(DATA_DIR),--data_dir "$(DATA_DIR)")
endif

# An evaluation that make runs again although it is there is older than its adapter: its records are of another one.
FRESH = [ ! -e $@ ] || rm -r $(@D)
TINY_BASE := outputs/tiny-base/config.json
TINY_DATA := outputs/tiny/data/train.jsonl

# Behind the variables: prerequisites are expanded where they stand.
ifneq ($(filter reproduce-% train-% evaluate-% report outputs/%/manifest.json,$(MAKECMDGOALS)),)
PLAN := $(shell NIGHT_MODEL="$(NIGHT_MODEL)" $(PYTHON) -m experiments.paper.targets "$(SCALE)" --write $(FILTERS))
include $(or $(PLAN),$(error there is no plan, see above))
endif

plan-%:  ## what a table or figure will run, what is done, tokens, GPU-hours, disk: plan-table1, plan-all
	@$(PYTHON) -m experiments.paper.show $* --scale "$(SCALE)" --card "$(CARD)" $(FILTERS)

reproduce-%:  ## runs that and makes the table or figure: reproduce-table1, reproduce-all
	@echo "error: there is no target $@; make plan-all lists them" >&2; exit 1

NO_RUN = echo "error: there is no target $@ at SCALE=$(SCALE); make plan-table1 lists them" >&2; exit 1
train-%:  ## one training, by the name that plan-table1 gives it
	@$(NO_RUN)

evaluate-%:  ## one evaluation, likewise
	@$(NO_RUN)

$(TINY_BASE): | $(READY)
	$(PY) -m experiments.tiny.pretrain

$(TINY_DATA): | $(READY)
	$(PY) -m experiments.tiny.benchmarks --output $(@D)

# Does it learn? study-recall, -choices, -load, -windows, -sums, -registers, -names, -arithmetic, -smollm2,
# -registers-smollm2 (experiments/study/plan.py and the modules that it imports have the sizes that can be set). ARMS
# and SEEDS leave runs out; every run has a target, study-recall-pte-0.
plan-study-%:  ## what a study will run, what is done, minutes: plan-study-load
	@$(PYTHON) -m experiments.study.show $*

.PHONY: FORCE
outputs/study/plan.mk: FORCE
	@mkdir -p $(@D)
	@$(PYTHON) -m experiments.study.plan > $@.tmp && { cmp -s $@.tmp $@ && rm $@.tmp || mv $@.tmp $@; }
ifneq ($(filter study study-%,$(MAKECMDGOALS)),)
include outputs/study/plan.mk
endif

report: | $(READY)  ## one HTML page of all finished tables and figures
	$(PY) -m experiments.paper.page --scale $(SCALE) --output $(OUTPUTS)/results

clean:  ## outputs and caches, not the environment
	rm -rf outputs .pytest_cache .ruff_cache .hypothesis

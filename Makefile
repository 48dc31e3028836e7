# One verb per job; `make` alone lists them. Settings can be given as `make train RUN=runs/mine`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
# On Linux the package index serves torch with CUDA. The CPU build:
# make install TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0
RUN ?= runs/quickstart
# The shipped two towers on Python source. `make train` starts from their context tower, uses their
# tokenizer, and compares its denoiser with theirs.
PAIR = recipes/models/code
PROMPT ?= def main():
PYTEST_ARGS ?=
# Processes of `make test`, more than cores: many tests wait for ranks of their own.
TEST_PROCESSES ?= 3
SOAK_MINUTES ?= 60

# Nothing is downloaded from a model hub, and nothing is sent to W&B unless a recipe or WANDB_MODE says so.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

BIN := $(VENV)/bin
TWOTOWER := $(BIN)/twotower
# Python compiles a module at its first import; pip would compile all eighteen thousand. Images of
# Docker often forbid to keep what is compiled: then every start of a process compiles it again, for
# ten seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-compile

.PHONY: help install train report bench speed samplers study code sft soak test test-slow test-gpu test-te test-mamba test-transformers test-releases test-slurm test-cluster check format backbone bytes clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Set-up ---------------------------------------------------------------------------------------------------------

install: $(VENV)/.installed ## build the virtual environment (the other verbs do it by themselves)

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"$(PYTHON): found Python {v}, expected 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV), once (about 2 minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "  torch ..."
	@$(PIP_INSTALL) $(TORCH)
	@echo "  megatron-twotower and what it needs ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "  tools for tests and checks ..."
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# The main job: from text to a two-tower model that generates. Each step is done once. A run that
# was interrupted resumes.

train: $(RUN)/longer.json ## everything on the source of Python's standard library: data, backbone, two towers, report
	$(TWOTOWER) generate --model $(RUN)/model --prompt '$(PROMPT)' --max-new-tokens 96 --temperature 0.3 --mode all \
	  --html $(RUN)/generation.html
	$(TWOTOWER) report --run $(RUN)

$(RUN)/data/train/index.json: | $(VENV)/.installed
	$(TWOTOWER) data prepare --input python-stdlib --tokenizer $(PAIR) --output $(RUN)/data

# The `ar` objective: a backbone from random weights.
$(RUN)/backbone/config.json: | $(RUN)/data/train/index.json
	$(TWOTOWER) train recipe=quickstart_ar data.folder=$(RUN)/data output=$(RUN)/ar
	$(TWOTOWER) convert export --from $(RUN)/ar --to $(RUN)/backbone

TOWERS = recipe=quickstart data.folder=$(RUN)/data init.backbone=$(PAIR)
SHORT = train.steps=60 schedule.decay_steps=0

# The other initialisation of the time conditioning, long enough to compare: the report has both.
RELEASED = $(RUN)/conditioning/released/checkpoints/step-00000060/state.json
$(RELEASED): | $(RUN)/backbone/config.json
	$(TWOTOWER) train $(TOWERS) $(SHORT) conditioning.initialisation=released output=$(RUN)/conditioning/released

$(RUN)/model/config.json: | $(RELEASED)
	$(TWOTOWER) train $(TOWERS) output=$(RUN)/twotower
	$(TWOTOWER) convert export --from $(RUN)/twotower --to $(RUN)/model

EVALUATE = $(TWOTOWER) evaluate --data $(RUN)/data --thresholds 0.9 0.8 0.6 0.4 --block-sizes

$(RUN)/evaluation.json: | $(RUN)/model/config.json
	$(EVALUATE) --model $(RUN)/model --output $(RUN)/evaluation.json

# What hours buy. The shipped weights are bfloat16, in which a CPU is slow.
$(RUN)/longer/config.json: | $(RUN)/evaluation.json
	$(TWOTOWER) convert export --from $(PAIR) --to $(RUN)/longer --dtype fp32

$(RUN)/longer.json: | $(RUN)/longer/config.json
	$(EVALUATE) --model $(RUN)/longer --output $(RUN)/longer.json

report: $(VENV)/.installed ## write the report of a run again (RUN=runs/quickstart)
	$(TWOTOWER) report --run $(RUN)

backbone: runs/studies/small/data/train/index.json ## train the backbone in recipes/backbones/small again (long)
	$(TWOTOWER) train recipe=backbone data.folder=runs/studies/small/data output=runs/backbone
	$(TWOTOWER) convert export --from runs/backbone --to runs/backbone-hf --dtype bf16

# The two towers on bytes: a tokenizer without merges, a backbone, two towers, and the denoiser again on
# text that the backbone wrote.
BYTES = runs/bytes

$(BYTES)/data/train/index.json: | $(VENV)/.installed
	$(TWOTOWER) data tokenizer --input python-stdlib --vocab-size 260 --output $(BYTES)/tokenizer
	$(TWOTOWER) data prepare --input python-stdlib --tokenizer $(BYTES)/tokenizer --output $(BYTES)/data

bytes: $(BYTES)/data/train/index.json ## train the two towers on bytes in recipes/models again (long)
	$(TWOTOWER) train recipe=bytes_ar
	$(TWOTOWER) convert export --from $(BYTES)/ar --to $(BYTES)/backbone
	$(TWOTOWER) train recipe=bytes init.backbone=$(BYTES)/backbone
	$(TWOTOWER) convert export --from $(BYTES)/twotower --to $(BYTES)/undistilled
	$(TWOTOWER) distil --model $(BYTES)/undistilled --data $(BYTES)/data --output $(BYTES)/distilled-data --sequences 5120
	$(TWOTOWER) train recipe=bytes_distil init.denoiser=$(BYTES)/undistilled
	$(TWOTOWER) convert export --from $(BYTES)/distilled --to $(BYTES)/model --dtype bf16

# Two towers on Python source: the standard library and the installed packages under permissive licences, without those
# that questions are cut from.
CODE = runs/code
CODE_INPUT = --input python-stdlib python-packages

$(CODE)/data/train/index.json: | $(VENV)/.installed-dev
	$(TWOTOWER) data tokenizer $(CODE_INPUT) --vocab-size 1024 --output $(CODE)/tokenizer
	$(TWOTOWER) data prepare $(CODE_INPUT) --tokenizer $(CODE)/tokenizer --output $(CODE)/data --max-tokens 60000

# Two ranks are faster than one with two threads. Tasks are measured in fp32: a CPU is slow in bfloat16.
CODE_TRAIN = PATH="$(abspath $(BIN)):$$PATH" RANKS_PER_NODE=2 launch/torchrun.sh

# `twotower distil` needs a folder of two towers, and only its context tower.
code: $(CODE)/data/train/index.json ## train recipes/models/code again, and compare AR with mask diffusion on tasks (about four hours, resumes)
	$(CODE_TRAIN) recipe=code_ar
	test -d $(CODE)/backbone || $(TWOTOWER) convert export --from $(CODE)/ar --to $(CODE)/backbone
	test -d $(CODE)/untrained || $(TWOTOWER) convert export --from $(CODE)/ar --what two_tower --to $(CODE)/untrained
	test -d $(CODE)/written-data || $(TWOTOWER) distil --model $(CODE)/untrained --data $(CODE)/data \
	  --output $(CODE)/written-data --sequences 11264 --prompt-tokens 128 --new-tokens 128
	$(CODE_TRAIN) recipe=code
	test -d $(CODE)/model || $(TWOTOWER) convert export --from $(CODE)/twotower --to $(CODE)/model --dtype bf16
	test -d $(CODE)/fp32 || $(TWOTOWER) convert export --from $(CODE)/twotower --to $(CODE)/fp32
	$(TWOTOWER) evaluate --model $(CODE)/fp32 --tasks code_small --output $(CODE)/tasks.json

# Instruction tuning of the two towers on bytes: conversations about the standard library, a
# post-trained backbone, and the denoiser under it.
SFT = runs/sft

$(SFT)/chats/train/index.json: | $(VENV)/.installed
	$(TWOTOWER) data conversations --output $(SFT)/library.jsonl
	$(TWOTOWER) data prepare --chat --chat-template recipes/chat_templates/plain.jinja --input $(SFT)/library.jsonl \
	  --tokenizer recipes/models/bytes --output $(SFT)/chats

sft: $(SFT)/chats/train/index.json ## tune the two towers on bytes on conversations, and measure their answers (long)
	$(TWOTOWER) convert export --from recipes/models/bytes --what context --to $(SFT)/base
	$(TWOTOWER) train recipe=sft_ar
	$(TWOTOWER) convert export --from $(SFT)/backbone --to $(SFT)/instruct
	$(TWOTOWER) convert export --from recipes/models/bytes --backbone $(SFT)/instruct --to $(SFT)/swapped
	$(TWOTOWER) train recipe=sft init.backbone=$(SFT)/instruct
	$(TWOTOWER) convert export --from $(SFT)/twotower --to $(SFT)/model
	for model in swapped model; do $(TWOTOWER) evaluate --model $(SFT)/$$model --data $(SFT)/chats \
	  --output $(SFT)/$$model.json --sequences 400 --thresholds 0.8 --new-tokens 48; done

speed: $(BYTES)/data/train/index.json ## the two towers on bytes: mask diffusion against cached AR, and what a pass costs (4 minutes)
	rm -rf $(BYTES)/fp32
	$(TWOTOWER) convert export --from recipes/models/bytes --to $(BYTES)/fp32 --dtype fp32
	$(TWOTOWER) evaluate --model $(BYTES)/fp32 --data $(BYTES)/data --output $(BYTES)/speed.json --prompts 16 \
	  --sequences 32 --thresholds 0.9 0.8 0.7 0.6 0.5 --block-sizes 8 32 --steps --new-tokens 192
	$(TWOTOWER) bench passes --model $(BYTES)/fp32

# Every second of these windows begins between two of 16 windows of the same length, on which the setting was chosen.
samplers: $(BYTES)/data/train/index.json ## the two towers on bytes: samplers against the released rule (4 minutes)
	rm -rf $(BYTES)/fp32
	$(TWOTOWER) convert export --from recipes/models/bytes --to $(BYTES)/fp32 --dtype fp32
	$(TWOTOWER) evaluate --model $(BYTES)/fp32 --data $(BYTES)/data --output $(BYTES)/samplers.json --prompts 31 \
	  --sequences 31 --length 128 --draws 1 --new-tokens 96 --block-sizes --steps --samples 0 --thresholds 0.9 0.8 0.6 \
	  0.4 --samplers factor:2 credit:0.8 early_end:0.9,2 early_end:0.8,2 by_position:0.5,0.9 by_step:0.9,0.3,4 routed:0.8,1

# Both backbones are shipped, with the tokenizers of their data.
STUDY ?= objective
STUDIES = runs/studies

$(STUDIES)/%/data/train/index.json: | $(VENV)/.installed
	$(TWOTOWER) data prepare --input python-stdlib --tokenizer recipes/backbones/$* --output $(STUDIES)/$*/data

study: $(STUDIES)/mini/data/train/index.json $(STUDIES)/small/data/train/index.json ## compare ways to train over seeds (STUDY=objective, without_shift or paper; hours, resumes)
	$(TWOTOWER) study recipes/studies/$(STUDY).yaml --output $(STUDIES)/$(STUDY) --workers 2

bench: $(VENV)/.installed ## measure operations, steps and the loader (about half an hour)
	$(TWOTOWER) bench ops
	$(TWOTOWER) bench step
	$(TWOTOWER) bench data

soak: $(VENV)/.installed ## kill a small run again and again, and account for every sample (SOAK_MINUTES=60)
	rm -rf runs/soak
	$(TWOTOWER) bench soak --minutes $(SOAK_MINUTES) --output runs/soak

# Development ----------------------------------------------------------------------------------------------------

test: $(VENV)/.installed-dev ## run the tests (PYTEST_ARGS='tests/ops -k scan')
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-dev ## run the tests that need a CUDA device; without one they fail (figures: runs/test-gpu.jsonl)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-te: $(VENV)/.installed-dev ## build the layers with Transformer Engine's modules, which must be installed; no GPU needed
	$(BIN)/python -m pytest -m te $(PYTEST_ARGS)

# The package without its CUDA extension, in a bare environment in front of this one. Tried: 2.3.2.post1; 2.2.4 fails.
MAMBA_SSM ?= 2.3.2.post1
MAMBA := $(VENV)-mamba-$(MAMBA_SSM)

test-mamba: $(VENV)/.installed-dev ## the real mamba-ssm in Triton's interpreter and compiled for Hopper, no GPU (MAMBA_SSM=2.3.2.post1; minutes)
	@test -x $(MAMBA)/bin/python || $(PYTHON) -m venv $(MAMBA)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(MAMBA)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_base.pth"
	@$(MAMBA)/bin/python -m pip install -qq einops wheel packaging
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(MAMBA)/bin/python -m pip install -qq --no-build-isolation --no-deps \
	  mamba-ssm==$(MAMBA_SSM)
	$(MAMBA)/bin/python -m pytest -m mamba $(PYTEST_ARGS)

# The shipped model file in another release: a bare environment in front of this one. Tried: 5.3.0, 5.12.0.
TRANSFORMERS ?= 5.3.0
OTHER := $(VENV)-transformers-$(TRANSFORMERS)

test-transformers: $(VENV)/.installed-dev ## test model file and tokenizers with another transformers (TRANSFORMERS=5.3.0)
	@test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(OTHER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_base.pth"
	@$(OTHER)/bin/python -m pip install -qq transformers==$(TRANSFORMERS)
	$(OTHER)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(OTHER)/bin/python -m pytest tests/hf tests/data/test_tokenizer.py $(PYTEST_ARGS)

# Another Python, and with it another Megatron Core: 0.16.1 is the last for 3.11, from 3.12 on there is 0.19. The whole suite
# there: make test PYTHON=python3.12 VENV=.venv-other
OTHER_PYTHON ?= python3.12
OTHER_VENV ?= .venv-other

test-releases: $(VENV)/.installed-dev ## test that checkpoints go from one release of Megatron to another (OTHER_PYTHON=python3.12)
	$(MAKE) install PYTHON=$(OTHER_PYTHON) VENV=$(OTHER_VENV)
	TWOTOWER_OTHER_PYTHON=$(abspath $(OTHER_VENV))/bin/python $(BIN)/python -m pytest -m releases $(PYTEST_ARGS)

# Of two nodes, on this machine, started by the tests themselves. It takes root and Debian's slurm-wlm and munge.
test-slurm: $(VENV)/.installed-dev ## run the launch scripts on a real Slurm (as root; apt-get install slurm-wlm munge)
	@for each in slurmctld slurmd munged sbatch; do PATH="$$PATH:/usr/sbin" command -v $$each >/dev/null || { echo "test-slurm: $$each not found, expected a Slurm (apt-get install slurm-wlm munge)"; exit 2; }; done
	@test "$$(id -u)" = 0 || { echo "test-slurm: found user $$(id -un), expected root (slurmd starts tasks for users)"; exit 2; }
	$(BIN)/python -m pytest -m slurm $(PYTEST_ARGS)

test-cluster: $(VENV)/.installed-dev ## kill workers, nodes and drivers of a Ray of several nodes at random (half an hour)
	$(BIN)/python -m pytest -m cluster $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## sort imports, fix what the linter can fix, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and builds; runs/ and the virtual environment stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

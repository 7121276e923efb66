# Everything a person types here sets up what it needs in ./.venv; PYTHON names the interpreter to begin with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-full bench bench-baseline gpu-check lint format

help:
	@echo "make quickstart   from shipped images to trained samples, about 6 minutes on 2 cores; DEVICE=gpu: on all GPUs"
	@echo "make test         the tests that need no GPU"
	@echo "make test-full    the slow tests too"
	@echo "make bench        what was measured to be faster than something else still is, about 6 minutes on 2 cores"
	@echo "make lint         ruff, mypy, and shellcheck over the job scripts"
	@echo "make gpu-check    everything that needs a GPU, checked and measured on the first one, in two calls of minutes"
	@echo "make install      only the virtual environment ./.venv"

# Installed anew when setup.py or the interpreter has changed.
install: $(STAMP)
$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v else f"Python 3.10 or later is needed, {sys.executable} is %d.%d; name another with make PYTHON=..." % v)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Real images to samples by the commands that ImageNet takes: on two CPU processes, which leave GPUs alone, or with
# DEVICE=gpu on the GPUs of this machine, a process each. The batch of 64 is split evenly, so their number is rounded
# down to a power of two.
DEVICE := cpu
ifeq ($(DEVICE),cpu)
PROCESSES := 2
quickstart: export CUDA_VISIBLE_DEVICES :=
else ifeq ($(DEVICE),gpu)
PROCESSES := $$(cat $(VENV)/gpu-processes)
else
$(error DEVICE=$(DEVICE): expected cpu or gpu)
endif
quickstart: export OMP_NUM_THREADS := 1
quickstart: $(STAMP)
ifeq ($(DEVICE),gpu)
	@$(BIN)/python -c $(COUNT_GPUS) > $(VENV)/gpu-processes
endif
	$(TOKENIZE) --split train --out data/fashion_mnist/train
	$(TOKENIZE) --split val --out data/fashion_mnist/val
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m npp_ds train --recipe quickstart
	OMP_NUM_THREADS=2 $(BIN)/npp sample runs/quickstart --per-class 40 --cfg-scale $(CFG_SCALE)
	OMP_NUM_THREADS=2 $(BIN)/npp evaluate runs/quickstart --reference 'data_prep/fashion_mnist/val-*.tar.gz'
	$(BIN)/npp report runs/quickstart $(NEXT_STEPS)

TOKENIZE = OMP_NUM_THREADS=2 $(BIN)/python data_prep/tokenize_imagenet.py --images data_prep/fashion_mnist \
	--tokenizer fashion_mnist --image-size 32 --crops center
CFG_SCALE := 3
COUNT_GPUS := 'import sys, torch; n = torch.cuda.device_count(); \
	sys.exit("DEVICE=gpu: PyTorch finds no CUDA device on this machine; leave DEVICE out to use the CPU") if not n \
	else print(1 << (n.bit_length() - 1))'
NEXT_STEPS = --next-step "$(BIN)/npp sample runs/quickstart --classes sneaker,bag --cfg-scale 4 --seed 1" \
	--next-step "$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m npp_ds train --recipe quickstart name=longer schedule.stages.2.epochs=12" \
	--next-step "ImageNet: see 'On to ImageNet' in README.md"

# Two files at a time: many tests wait or start one process. make test WORKERS=8 on a larger machine.
WORKERS := 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-full: $(STAMP)
	$(PYTEST)

# Ratios within one run, never times, beside benchmarks/baseline.json; the second measures that file anew.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.guard

bench-baseline: $(STAMP)
	$(BIN)/python -m benchmarks.guard --update

# Where there is no ./.venv (a machine without a network) by PYTHON itself; ARGS="--limit 260" resumes.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck slurm/*.sh benchmarks/*.sh .ci/run

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

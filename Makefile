# The targets install what they need into ./.venv. PYTHON is the interpreter that creates it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-full test-oldest test-lower-bounds test-torch-2.11 bench bench-baseline gpu-check docs lint format

help:
	@echo "make quickstart   train on the shipped images, then sample; about 6 minutes on 2 cores; DEVICE=gpu: on all GPUs"
	@echo "make test         run the fast tests; those that need a GPU are skipped without one"
	@echo "make test-full    run all tests, also the slow ones"
	@echo "make test-oldest  run tests with the oldest versions that setup.py allows, and with PyTorch 2.11; about 12 minutes"
	@echo "make bench        compare the benchmarks' ratios with their baseline; about 6 minutes on 2 cores"
	@echo "make docs         build the documentation site into site/, after checking all links"
	@echo "make lint         run ruff, mypy, and shellcheck on the shell scripts"
	@echo "make gpu-check    check and measure everything that needs a GPU, on the first GPU; two calls of 6 and 5 minutes"
	@echo "make install      create the virtual environment ./.venv"

# Install again if setup.py, pyproject.toml or the interpreter has changed.
install: $(STAMP)
$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v else f"Python 3.10 or later is needed, {sys.executable} is %d.%d; name another with make PYTHON=..." % v)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# From real images to samples with the commands for ImageNet: in two CPU processes, or with DEVICE=gpu in one process per
# GPU of this machine. The batch of 64 is split evenly, so their number is rounded down to a power of two.
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

# Run the tests of model, data, training and weights with other versions (docs/versions.md): with all lower bounds of
# setup.py, and with PyTorch 2.11. Each uses a separate environment of up to 8 GB. Not part of CI.
PYTHON_OLDEST ?= python3.10
PYTHON_RECENT ?= python3.12
VERSIONS := .venv-oldest
VERSION_TESTS := tests/model tests/config tests/data tests/checkpoint $(patsubst %,tests/training/test_%.py,initial_weights \
	compile cuda_graphs training ema metrics loss_checks)

test-oldest: test-lower-bounds test-torch-2.11
test-lower-bounds test-torch-2.11: test-%: $(VERSIONS)/%/.installed
	OMP_NUM_THREADS=1 $(VERSIONS)/$*/bin/python -m pytest -q -m "not slow and not gpu" $(VERSION_TESTS)

$(VERSIONS)/lower-bounds/.installed: INTERPRETER = $(PYTHON_OLDEST)
$(VERSIONS)/torch-2.11/.installed: INTERPRETER = $(PYTHON_RECENT)
$(VERSIONS)/%/.installed: $(VERSIONS)/%.txt
	$(INTERPRETER) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(@D)/bin/python -m pip install --quiet --editable '.[dev]' --constraint $<
	@touch $@

$(VERSIONS)/lower-bounds.txt: setup.py
	@mkdir -p $(@D)
	grep -oE '"[A-Za-z][A-Za-z-]*>=[0-9.]+"' setup.py | tr -d '"' | sed 's/>=/==/' > $@
$(VERSIONS)/torch-2.11.txt: setup.py
	@mkdir -p $(@D)
	printf '%s\n' torch==2.11.0 deepspeed==0.19.8 > $@

# Compare ratios within one run, not times, with benchmarks/baseline.json; `bench-baseline` measures that file again.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.guard

bench-baseline: $(STAMP)
	$(BIN)/python -m benchmarks.guard --update

# Without ./.venv (on a machine without a network), PYTHON runs it. ARGS="--limit 260" resumes.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck slurm/*.sh benchmarks/*.sh .ci/run

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

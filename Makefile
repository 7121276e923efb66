# Everything a person types here sets up what it needs in ./.venv; PYTHON names the interpreter to begin with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-full lint format

help:
	@echo "make quickstart   from shipped images to trained samples, about 6 minutes on 2 cores"
	@echo "make test         the tests that need no GPU"
	@echo "make test-full    the slow tests too"
	@echo "make lint         ruff"
	@echo "make install      only the virtual environment ./.venv"

# Installed anew when setup.py or the interpreter has changed.
install: $(STAMP)
$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v else f"Python 3.10 or later is needed, {sys.executable} is %d.%d; name another with make PYTHON=..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

quickstart: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash studies/quickstart.sh

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow"

test-full: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

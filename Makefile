# `make demo` and `make test` need Python 3.10 or newer, pip and make: they set up everything else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
POCKET_OUT ?= training/run/package

.PHONY: demo test lint types check architectures bench pocket clean

demo: $(READY)  ## find a steering vector on the bundled model and watch it work
	$(BIN)/mlxsteer demo

test: $(READY)  ## the tests, documentation blocks included
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

architectures: $(READY)  ## what the checks find on every mlx-lm architecture: writes docs/architectures.md
	$(BIN)/python -m benchmarks.architectures

bench: $(READY)  ## cost of reading and steering, as ratios to bare mlx-lm
	$(BIN)/python benchmarks/overhead.py

pocket: $(READY)  ## train the bundled model anew (hours on a CPU); POCKET_OUT=mlxsteer replaces the one in the package
	$(BIN)/python -m pip install -qq -r training/requirements.txt
	$(BIN)/python -m training --package $(POCKET_OUT)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

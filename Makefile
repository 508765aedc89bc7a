# `make demo` and `make test` need Python 3.11 or newer, pip and make: they set up everything else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
POCKET_OUT ?= training/run/package

.PHONY: demo test test-all tutorials lint types check docs architectures bench peers pocket clean

demo: $(READY)  ## find a steering vector on the bundled model and watch it work
	$(BIN)/mlxsteer demo

test: $(READY)  ## the tests, documentation blocks included
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-all: $(READY)  ## all tests, the slow ones too, and every tutorial from top to bottom
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "full or not full"

tutorials: $(READY)  ## run the tutorials anew and store what they print and draw
	$(BIN)/python -m tutorials.execute

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

docs: $(VENV)/.docs  ## the documentation site, into build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mkdocs build --strict --quiet

architectures: $(READY)  ## what the checks find on every mlx-lm architecture: writes docs/architectures.md
	$(BIN)/python -m benchmarks.architectures

bench: $(READY)  ## cost of reading and steering, as ratios to bare mlx-lm
	$(BIN)/python benchmarks/overhead.py

peers: $(READY)  ## the same work on other MLX tools; PEERS="--path mlxterp=../mlxterp" for clones of them
	$(BIN)/python benchmarks/peers.py --markdown $(PEERS)

pocket: $(READY)  ## train the bundled model anew (hours on a CPU); POCKET_OUT=mlxsteer replaces the one in the package
	$(BIN)/python -m pip install -qq -r training/requirements.txt
	$(BIN)/python -m training --package $(POCKET_OUT)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable '.[dev]'
	touch $(READY)

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install -qq --editable '.[docs]'
	touch $(VENV)/.docs

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

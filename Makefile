# `make quickstart` trains a one-step generator of digits; `make test` runs the test suite, `make test-all` also the
# long grids that it leaves out. They share .venv. To take a CPU build of PyTorch, see the README.
# `make test-evaluation` tests the extractors of FID, which need torchvision and the PyTorch that it belongs to, in an
# environment of their own (5.4 GB).

PYTHON ?= python3
BIN := .venv/bin
EVALUATION := .venv-evaluation
# Threads that wait for each other spin for some tens of microseconds, then sleep. Without a limit, two busy threads
# on two cores that something else uses too take turns at spinning, and steps get several times slower.
export GOMP_SPINCOUNT := 20000
QUICKSTART := runs/quickstart

.PHONY: quickstart test test-all test-evaluation lint format clean

quickstart: .venv/ready
	@if [ -e $(QUICKSTART)/config.yaml ]; \
	then $(BIN)/tvmatch train --resume $(QUICKSTART); \
	else $(BIN)/tvmatch train digits --out $(QUICKSTART); fi

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m exhaustive

test-evaluation: $(EVALUATION)/ready
	$(EVALUATION)/bin/python -m pytest tests_evaluation

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(EVALUATION) build dist src/*.egg-info

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tvmatch needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# Bytecode of 5 GB of packages would take longer to write than the tests run: only what they import is compiled.
$(EVALUATION)/ready: pyproject.toml constraints-evaluation.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tvmatch needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(EVALUATION)
	$(EVALUATION)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  --constraint constraints-evaluation.txt --editable '.[evaluation]' pytest
	touch $@

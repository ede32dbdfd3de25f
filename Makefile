# `make quickstart` trains a one-step generator of digits; `make test` runs the whole test suite.
# Both share .venv. To take a CPU build of PyTorch, see the README.

PYTHON ?= python3
BIN := .venv/bin
# Threads that wait for each other spin for some tens of microseconds, then sleep. Without a limit, two busy threads
# on two cores that something else uses too take turns at spinning, and steps get several times slower.
export GOMP_SPINCOUNT := 20000
QUICKSTART := runs/quickstart

.PHONY: quickstart test lint format clean

quickstart: .venv/ready
	@if [ -e $(QUICKSTART)/config.yaml ]; \
	then $(BIN)/tvmatch train --resume $(QUICKSTART); \
	else $(BIN)/tvmatch train digits --out $(QUICKSTART); fi

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist src/*.egg-info

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tvmatch needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

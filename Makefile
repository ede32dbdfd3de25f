# `make quickstart` trains a one-step generator of digits; `make test` runs the test suite, `make test-all` also the
# long grids that it leaves out. They share .venv. To take a CPU build of PyTorch, see the README.
# `make test-evaluation` tests the extractors of FID, which need torchvision and the PyTorch that it belongs to, in an
# environment of their own (5.4 GB).
# `make test-versions` runs the tests that depend on PyTorch on the oldest that is declared, the pinned and the newest
# one (6 GB for each of the two that it builds). Remove .venv-versions/newest to take what is newest by then.

PYTHON ?= python3
BIN := .venv/bin
EVALUATION := .venv-evaluation
VERSIONS := .venv-versions
# The least PyTorch of pyproject.toml; its Triton's interpreter needs an older NumPy.
OLDEST := torch==2.11.0 numpy<2.4
# Threads that wait for each other spin for some tens of microseconds, then sleep. Without a limit, two busy threads
# on two cores that something else uses too take turns at spinning, and steps get several times slower.
export GOMP_SPINCOUNT := 20000
QUICKSTART := runs/quickstart

.PHONY: quickstart test test-all test-evaluation test-versions lint format clean

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

test-versions: .venv/ready $(VERSIONS)/oldest/ready $(VERSIONS)/newest/ready
	$(BIN)/python tests/versions.py oldest=$(VERSIONS)/oldest/bin/python pinned=$(BIN)/python \
	  newest=$(VERSIONS)/newest/bin/python

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(EVALUATION) $(VERSIONS) build dist src/*.egg-info

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

$(VERSIONS)/oldest/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VERSIONS)/oldest
	grep -viE '^(torch|triton|numpy|setuptools)==' constraints.txt > $(VERSIONS)/oldest/constraints.txt
	printf '%s\n' $(foreach pin,$(OLDEST),'$(pin)') >> $(VERSIONS)/oldest/constraints.txt
	$(VERSIONS)/oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  --constraint $(VERSIONS)/oldest/constraints.txt --editable '.[test]'
	touch $@

$(VERSIONS)/newest/ready: pyproject.toml
	$(PYTHON) -m venv $(VERSIONS)/newest
	$(VERSIONS)/newest/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[test]'
	touch $@

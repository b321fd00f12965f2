# make demo   set up and run the whole job on this machine's CPU
# make test   set up and run the test suite
# Everything lives in .venv; nothing else on the machine is touched.

PYTHON ?= python3
# A GPU machine may want another build of torch: make TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint mutants bench-data bench-smoke wheel clean

demo: $(VENV)/installed
	$(BIN)/sft-dist demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(VENV)/installed
	$(BIN)/python tests/mutants.py

bench-data: $(VENV)/installed
	$(BIN)/python benchmarks/prepare_vs_trl.py
	$(BIN)/python benchmarks/prepare_scale.py

# The same on few rows: that the scripts run and both sides make the same tokens, not how fast.
bench-smoke: $(VENV)/installed
	$(BIN)/python benchmarks/prepare_vs_trl.py --rows 300 --repeats 1
	$(BIN)/python benchmarks/prepare_scale.py --rows 2000

wheel: $(VENV)/installed
	$(BIN)/python -m build --wheel

# torch first: the rest then finds it satisfied and pulls no other build.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sft_dist needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist

# make demo   set up and run the whole job on this machine's CPU
# make test   set up and run the test suite
# Everything lives in .venv; nothing else on the machine is touched.

PYTHON ?= python3
# A GPU machine may want another build of torch: make TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint mutants bench bench-check bench-data bench-smoke bench-checkpoints plan-check faults faults-full soak soak-short hosts slurm wheel docs notebook clean

demo: $(VENV)/installed
	$(BIN)/sft-dist demo

# Two at a time; by itself what measures seconds, and what runs on as many processes as there are cores and more.
ALONE := tests/unit/test_schedule_speed.py
test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/launch tests/browser tests/unit tests/gpu $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(ALONE) tests/numerics tests/distributed

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages as a site that needs no network: build/site/index.html. Fails on a link to nothing and on a page without a place.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo built build/site/index.html

# The notebook, without its first cell, in a directory of its own with the files of the wheel: a minute.
notebook: $(VENV)/installed
	$(BIN)/python tests/notebook.py

mutants: $(VENV)/installed
	$(BIN)/python tests/mutants.py

# Real faults on real processes, one engine each: about 10 minutes. faults-full: on every engine that matters.
faults: $(VENV)/installed
	$(BIN)/python -m pytest tests/faults

faults-full: $(VENV)/installed
	FAULTS=full $(BIN)/python -m pytest tests/faults

# One run, killed at random again and again: 8 times, or 30.
soak-short: $(VENV)/installed
	$(BIN)/python tests/faults/soak.py --kills 8

soak: $(VENV)/installed
	$(BIN)/python tests/faults/soak.py --kills 30

# Two hosts, each with processes and network devices of its own: two minutes. As root.
hosts: $(VENV)/installed
	$(BIN)/python -m pytest tests/hosts

# Real trainings on a SLURM cluster of two nodes that exists only meanwhile: ten minutes. As root, with Debian's packages.
slurm: $(VENV)/installed
	tests/slurm/cluster.sh $(BIN)/python -m pytest tests/slurm

# Training on this CPU against TRL, with ratios: ten minutes of a quiet machine.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/cpu_vs_trl.py --check

# The ratios of one small setting against the committed ones.
bench-check: $(VENV)/installed
	$(BIN)/python benchmarks/cpu_vs_trl.py --quick --check

bench-data: $(VENV)/installed
	$(BIN)/python benchmarks/prepare_vs_trl.py
	$(BIN)/python benchmarks/prepare_scale.py

# The same on few rows: that the scripts run and both sides make the same tokens, not how fast.
bench-smoke: $(VENV)/installed
	$(BIN)/python benchmarks/prepare_vs_trl.py --rows 300 --repeats 1
	$(BIN)/python benchmarks/prepare_scale.py --rows 2000
	$(BIN)/python benchmarks/checkpoints.py --small --engines zero2

# What saving and resuming cost, on 200 million parameters: half an hour of a quiet machine at most.
bench-checkpoints: $(VENV)/installed
	$(BIN)/python benchmarks/checkpoints.py

# What `sft-dist plan` says of memory against what trainings take: half an hour of a quiet machine.
plan-check: $(VENV)/installed
	$(BIN)/python benchmarks/plan_check.py

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

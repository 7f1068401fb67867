# make quick   first run: an NFE-against-error report in out/quick, under a minute after installation
# make test    everything CI checks: lint, types, tests
# make slow    the tests that are left out there: minutes more, every order again on every path
# make history times of the hot paths beside the peers', kept in out/history and compared with the last ones there
# Each creates .venv and installs what it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quick test lint types pytest slow history clean

quick: $(VENV)/.quick
	$(BIN)/python -m benchmarks quick

test: lint types pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/basedpyright --threads 2 --level error

pytest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

history: $(VENV)/.dev
	$(PIP) pytest-benchmark
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks/history --benchmark-autosave \
	  --benchmark-storage=file://out/history $(if $(wildcard out/history),--benchmark-compare)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch alone first: an unpinned one, or one pulled in by another package, may be another build of several GB
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	touch $@

$(VENV)/.quick: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[report]'
	touch $@

# Libraries that adapters and samplers are compared with, alone: some ask for torchvision, whose wheels do not fit this torch.
$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps azula einops flow_matching k-diffusion torchode torchtyping typeguard
	touch $@ $(VENV)/.quick

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

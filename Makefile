# make quick   first run: an NFE-against-error report in out/quick, under a minute after installation
# make test    everything CI checks: lint, types, tests
# Both create .venv and install what they need.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quick test lint types pytest clean

quick: $(VENV)/.quick
	$(BIN)/python -m benchmarks quick

test: lint types pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/basedpyright --level error

pytest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch alone first: an unpinned one, or one pulled in by another package, may be another build of several GB
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	touch $@

$(VENV)/.quick: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[report]'
	touch $@

# Libraries that the adapters are compared with, alone: azula asks for torchvision, whose wheels do not fit this torch.
$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps azula einops flow_matching
	touch $@ $(VENV)/.quick

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

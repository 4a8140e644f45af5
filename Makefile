# make demo                     set up, train a world model from pixels, steer an agent with it: runs/demo/
# make test | lint | bench      what contributors run; test-interpret and test-one-thread repeat the tests the hard way
# make bench-compare            runs bench, then fails if a ratio is more than 15 % below that of benches/baseline.json
# make docs                     the documentation site, built strictly: build/docs/index.html
# make peers                    stable-worldmodel in an environment of its own: tests against it, then the comparison
# make systems-peers            TD-MPC2 and DreamerV3 on TwoRoom with rewards, each in an environment of its own
# make wheel-check              the wheel and the sdist, each built, listed and installed in a clean environment
#
# VENV=path                     environment to use or make: the activated one, else .venv
# PYTHON=python3.12             Python that makes a new environment
# TORCH_INDEX=url               where torch comes from if the environment has none

VENV ?= $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
export VENV PYTHON TORCH_INDEX

.PHONY: demo test test-interpret test-one-thread lint bench bench-compare peers systems-peers docs wheel-check setup clean
.NOTPARALLEL:

demo: setup
	@start=$$(date +%s); $(BIN)/lewm demo --out runs/demo && echo "demo took $$(($$(date +%s) - start)) s"

test: setup
	cargo test --locked -p lewm-core
	$(BIN)/python -m pytest tests

test-interpret: export TRITON_INTERPRET = 1
test-one-thread: export OMP_NUM_THREADS = 1
test-interpret test-one-thread: test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	$(BIN)/mypy
	$(BIN)/stubtest lewm._core --mypy-config-file pyproject.toml

bench: setup
	@mkdir -p .benchmarks
	$(BIN)/python -m pytest benches -m "not peer" --benchmark-json=.benchmarks/cpu.json

bench-compare: bench
	$(BIN)/python -m benches.compare

# The warning is about a mkdocs that the extra does not take.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Its packages pin others, so it has an environment of its own. SWM_MAIN=path is a checkout of their main branch, if any.
PEERS := .venv-peers/bin/python
PEERS_OUT ?= benches/results/peers-$(shell date +%Y-%m-%d).json
peers:
	test -x $(PEERS) || $(PYTHON) -m venv .venv-peers
	$(PEERS) -m pip install '.[train,peers]' pytest
	$(PEERS) -m pytest tests/test_swm.py
	$(if $(SWM_MAIN),PYTHONPATH=$(SWM_MAIN) $(PEERS) -m pytest tests/test_swm.py)
	$(PEERS) -m benches.peers --out $(PEERS_OUT)
	$(PEERS) -m benches.peers --tables

# Each system writes a row, also if it cannot be installed or run; that row says why, and the next has its turn.
# SYSTEMS_SECONDS is what each trains. DreamerV3's own requirements do not install on Python 3.11 (gym==0.19.0), and its
# agent needs neither gym nor crafter nor tensorflow: it gets the jax of its time, for which there is no Python 3.13.
DREAMER := .venv-dreamer/bin/python
SYSTEMS_SECONDS ?= 720
SYSTEMS_OUT = benches/results/systems-peers-$(1)-$(shell date +%Y-%m-%d).json
SYSTEMS_ROW = -OMP_NUM_THREADS=1 $(2) -m benches.systems_peers $(1) --seconds $(SYSTEMS_SECONDS) --out $(call SYSTEMS_OUT,$(1))
systems-peers:
	test -x $(PEERS) || $(PYTHON) -m venv .venv-peers
	$(PEERS) -m pip install '.[train,peers]'
	test -x $(DREAMER) || $(PYTHON) -m venv .venv-dreamer
	$(DREAMER) -m pip install .
	-$(DREAMER) -m pip install --no-deps dreamerv3==1.5.0
	-$(DREAMER) -m pip install 'jax==0.4.20' 'jaxlib==0.4.20' 'tensorflow-probability==0.22.1' 'optax==0.1.7' \
	  'chex<0.1.86' 'numpy<2' 'scipy<1.13' rich ruamel.yaml cloudpickle
	$(call SYSTEMS_ROW,td-mpc2,$(PEERS))
	$(call SYSTEMS_ROW,dreamerv3,$(DREAMER))

wheel-check: setup
	$(BIN)/python -m pytest -v tests/test_packaging.py

setup:
	@sh scripts/setup.sh

# The environment and runs/ stay: they cost minutes.
clean:
	rm -rf target dist build python/lewm/_core.abi3.* .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

# Everything is set up by the targets themselves; they need Python 3.11 or later and a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What was released since yesterday is no reason for a failing test; `make upgrade` lets it in.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Without compiled files, pytest rewrites five hundred modules in every worker.
unexport PYTHONDONTWRITEBYTECODE
# Real processes, sockets and clocks on a machine that others use too: what fails is run again, in
# sight, so that one late packet in four thousand tests is not a verdict. What is broken fails thrice.
PATIENT := --reruns 2 --reruns-delay 2 -raR

.PHONY: demo test test-families quick processes resilience ray lint live wheel bench upgrade clean help

help:  ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## */\t/' | expand -t 10

demo: $(VENV)/.cli  ## See the main job done, on a real vLLM that is installed and started here
	@env -u VLLM_API_URL $(BIN)/vllm-unified demo

test: lint $(VENV)/.ray  ## All tests, those on a real vLLM included; what CI runs
	$(BIN)/vllm-unified engine install
	$(BIN)/python -m pytest $(PATIENT) -q -n 3 --dist worksteal -m "not live and not resilience and not ray"
	$(BIN)/python -m pytest $(PATIENT) -m resilience --durations=10
	$(BIN)/python -m pytest $(PATIENT) -m "ray and not thorough" --durations=10
	$(BIN)/python -m pytest $(PATIENT) -n 2 --dist loadgroup -m live --durations=20
	@$(MAKE) --no-print-directory wheel

quick: $(VENV)/.dev  ## All tests that need no vLLM and start no programs, in seconds
	$(BIN)/python -m pytest -q -n 3 --dist worksteal --hypothesis-profile quick \
	  -m "not live and not resilience and not processes and not ray"

processes: $(VENV)/.dev  ## The tests that start programs: servers with a fake engine, terminals
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "processes and not live"

resilience: $(VENV)/.dev  ## Fleets of simulators under faults, an outage, and overload
	$(BIN)/python -m pytest -m resilience

ray: $(VENV)/.ray  ## Batches on a Ray cluster of two nodes here; installs ray (240 MB) first
	$(BIN)/python -m pytest -m ray

live: $(VENV)/.dev  ## Only the tests on a real vLLM
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m live

test-families: $(VENV)/.dev  ## Tiny models of ten families, each on a real vLLM: ten minutes, not in CI
	$(BIN)/vllm-unified engine install
	$(BIN)/python -m pytest -v tests/families/families.py
	@cat build/families.md

lint: $(VENV)/.dev  ## Linter, formatter, types, and whether generated code is up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python scripts/generate_blocking.py --check

wheel: $(VENV)/.dev  ## Build wheel and sdist; install the wheel elsewhere, and use it
	@rm -rf dist build
	$(BIN)/python -m build --quiet
	@$(PYTHON) -m venv build/wheel
	@build/wheel/bin/python -m pip install -qq --disable-pip-version-check "$$(ls dist/*.whl)[cli]"
	cd build && wheel/bin/vllm-unified --version

bench: $(VENV)/.dev  ## Measure: beside other clients, the import, the pipeline
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/pipeline.py

upgrade:  ## The newest versions of all that tests need, into constraints.txt
	@rm -rf $(VENV)
	@: > constraints.txt
	@$(MAKE) --no-print-directory $(VENV)/.ray
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt

clean:  ## Remove what was made here; engines and models stay in the user's cache
	rm -rf $(VENV) benchmarks/.envs dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -U "pip>=25.1"

$(VENV)/.cli: pyproject.toml constraints.txt $(VENV)/bin/python
	@echo "Installing vllm-unified into $(VENV) ..."
	@$(PIP) -e '.[cli,speed]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/bin/python
	@echo "Installing vllm-unified and its development tools into $(VENV) ..."
	@$(PIP) -e '.[batch,cli,docker,schema,speed]' --group dev
	@touch $@ $(VENV)/.cli

$(VENV)/.ray: $(VENV)/.dev
	@echo "Installing ray into $(VENV) ..."
	@$(PIP) -e '.[ray]'
	@touch $@

PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
WORKERS ?= 2
BIN := $(VENV)/bin
# Each worker has its own part of the list, and takes from the longest that is left when it is done.
SHARED := --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo demo-sweep test test-slow test-lowest lint docs docs-serve clean

demo: $(VENV)/.installed  ## set up and run the main job
	$(BIN)/python -m itrain fit recipe=das_gender

demo-sweep: $(VENV)/.installed  ## set up and compare methods at every layer and position
	$(BIN)/python -m itrain sweep recipe=das_vs_probe_gender

test: $(VENV)/.installed-dev  ## set up and run the test suite
	$(BIN)/python -m pytest $(SHARED)

test-slow: $(VENV)/.installed-dev  ## what takes minutes: retraining the shipped model, compiling C++, and more pairs of processes
	$(BIN)/python -m pytest -m "slow and not gpu"

test-lowest: $(LOWEST)/.installed-dev  ## the same with every dependency at its lower bound; torch brings 3 GB of CUDA
	$(LOWEST)/bin/python -m pytest $(SHARED)

lint: $(VENV)/.installed-dev  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-docs  ## build the site into site/; a warning, a dead link or a page outside the nav stops it
	NO_MKDOCS_2_WARNING=1 PATH=$(BIN):$$PATH $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.installed-docs  ## show the site at localhost:8000, and again at each change
	NO_MKDOCS_2_WARNING=1 PATH=$(BIN):$$PATH $(BIN)/python -m mkdocs serve

clean:
	rm -rf $(VENV) $(LOWEST) site

# torch goes first and alone: whichever build of it is at hand (CPU or CUDA) then stays while the rest is resolved.
$(VENV)/.torch:
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet "torch>=2.7,<2.14"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@ $(VENV)/.installed

$(LOWEST)/.installed-dev: tests/constraints-lowest.txt pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint tests/constraints-lowest.txt --editable ".[dev,trackio,slurm]"
	touch $@

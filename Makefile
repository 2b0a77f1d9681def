PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-sweep test lint clean

demo: $(VENV)/.installed  ## set up and run the main job
	$(BIN)/python -m itrain fit recipe=das_gender

demo-sweep: $(VENV)/.installed  ## set up and compare methods at every layer and position
	$(BIN)/python -m itrain sweep recipe=das_vs_probe_gender

test: $(VENV)/.installed-dev  ## set up and run the test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)

# torch goes first and alone: whichever build of it is at hand (CPU or CUDA) then stays while the rest is resolved.
$(VENV)/.torch:
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet "torch>=2.6,<2.14"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed

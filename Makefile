# make demo    patch a fact in the default model, prove it, undo it
# make test    all tests
# make check   format, lint, strict types, layering: seconds
# make bench   how much faster ours is than the plain path; DATA=zsre:FILE takes other edits than the sample

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests benchmarks docs examples
# Two torch processes on few cores spin against each other unless told to wait quietly.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
WORKERS ?= 2
DATA ?= sample

.PHONY: demo test check bench format setup clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,adapters,retrieval,remote,report,cluster,harness,llama-cpp]"
	@touch $@

demo: setup
	@$(BIN)/factpatch demo

test: setup
	@$(BIN)/pytest -n $(WORKERS) --dist worksteal

check: setup
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	@$(BIN)/python benchmarks/speed.py --data $(DATA)

format: setup
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf $(VENV) build dist src/*.egg-info

# Two commands for a fresh machine; both make .venv first, when it is not there or out of date.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test types units test-long

demo: .venv/installed
	$(BIN)/sabrage train demo

test: .venv/installed
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	@# Beside each other, since the type checker takes a minute on one core.
	@$(MAKE) --no-print-directory --jobs 2 types units

types: .venv/installed
	$(BIN)/mypy

units: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu and not long" --numprocesses 2 --dist loadfile --durations=10

test-long: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

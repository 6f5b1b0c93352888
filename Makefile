# One command each, from a fresh clone: every target makes its own virtual environment first.
PYTHON ?= python3
# The version the figures were measured with. Any torch >= 2.10 serves: make test TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
MODE := $(or $(FASTREFINE_BUILD),auto)
VENV := .venv-$(MODE)
BIN := $(VENV)/bin
export FASTREFINE_BUILD := $(MODE)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint bench doctor clean

demo: $(VENV)/demo.stamp  ## the demo into the folder demo/
	$(BIN)/fastrefine demo --outdir demo

test: $(VENV)/test.stamp  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/lint.stamp  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test.stamp  ## the benchmark table of README
	$(BIN)/python -m benchmarks.table --run

doctor: $(VENV)/demo.stamp
	$(BIN)/fastrefine doctor

clean:
	rm -rf .venv-* build demo fastrefine/*.so *.egg-info

$(VENV)/demo.stamp: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(PIP) --editable ".[test,lint]"
	touch $@

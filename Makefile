# Every target does its own set-up: a .venv from the versions pinned in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-all lint format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## build the shipped model for this machine's CPU and print English from it
	$(BIN)/python -m compiler.build -o dist/demo
	$(BIN)/python -m runtime.generate dist/demo -n 96 --temperature 0.7 --seed 1 --prompt "It was a dark evening, and the old house"

test: setup
	$(BIN)/python -m pytest -n 2

test-all: setup  ## every case of the kernels of every machine, the emulated ones too
	$(BIN)/python -m pytest -n 2 --every-case

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

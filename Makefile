# Every target sets up what it needs in .venv first; nothing has to be installed by hand but Python and make.
PYTHON ?= python3
DEVICE ?= cpu
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint types bench build clean

demo: $(READY)  ## train a tiny ViLT for some steps with and without the loss
	$(BIN)/python -m examples.demo

test: lint types  ## lint, types and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)  ## measure again, with DEVICE=cuda on a card: writes benchmarks/results/
	$(BIN)/python -m benchmarks --device $(DEVICE)
	$(BIN)/python -m benchmarks.conventions
	$(BIN)/python -m benchmarks.capture_cost --device $(DEVICE)

build: $(READY)  ## wheel and sdist in dist/
	$(BIN)/python -m build

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[hf,timm,lightning,viz,dev]'
	touch $@

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

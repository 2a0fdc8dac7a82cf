# Every target sets up what it needs in .venv first; nothing has to be installed by hand but Python and make.
PYTHON ?= python3
DEVICE ?= cpu
BIN := .venv/bin
READY := .venv/.ready
# What needs no extra, on the lowest versions of the core dependencies. torch.compile is left to the newest: the compiler of
# PyTorch 2.6 cannot trace the losses in one graph.
LOWEST := reference conventions equivalence divergence schedules layout blocks metrics losses streaming \
	capture_hooks capture_product

.PHONY: demo test lint types docs bench fuzz soak build lowest release-check clean

demo: $(READY)  ## train a tiny ViLT for some steps with and without the loss
	$(BIN)/python -m examples.demo

test: lint types  ## lint, types and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)  ## the site in build/site/; for a look while writing: .venv/bin/mkdocs serve
	$(BIN)/mkdocs build --strict --site-dir build/site

bench: $(READY)  ## measure again, with DEVICE=cuda on a card: writes benchmarks/results/
	$(BIN)/python -m benchmarks --device $(DEVICE)
	$(BIN)/python -m benchmarks.conventions
	$(BIN)/python -m benchmarks.capture_cost --device $(DEVICE)

fuzz: $(READY)  ## new random inputs for every function: writes benchmarks/results/fuzz-cpu.json
	$(BIN)/python -m benchmarks.fuzz

soak: $(READY)  ## 2,000 training steps, to see whether anything grows: writes benchmarks/results/soak-cpu.json
	$(BIN)/python -m benchmarks.soak

build: $(READY)  ## wheel and sdist in dist/
	$(BIN)/python -m build

lowest:  ## the core tests on the lowest supported versions, tests/lowest.txt (PYTHON is a Python 3.11)
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/python -m pip install --quiet --constraint tests/lowest.txt --editable . pytest hypothesis numpy
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -k "not compile and not captured_layer" $(LOWEST:%=tests/test_%.py)

release-check: $(READY)  ## build, check what PyPI will show, install the wheel alone in a fresh environment
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear build/release
	build/release/bin/python -m pip install --quiet dist/*.whl
	cd build && release/bin/python -c 'import attncongruence; print(attncongruence.__version__)'

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[hf,timm,lightning,viz,docs,dev]'
	touch $@

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

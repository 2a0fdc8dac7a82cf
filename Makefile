# Every target sets up what it needs by itself; nothing has to be installed by hand but Python and make.
# The versions are those of constraints.txt, in .venv; with NEWEST=1 they are those of the day on which .venv-newest is
# made, and `make drift` makes it anew.
PYTHON ?= python3
DEVICE ?= cpu
NEWEST ?=
ONLY ?=
VENV := $(if $(NEWEST),.venv-newest,.venv)
LOCKED := $(if $(NEWEST),,--constraint constraints.txt)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

.PHONY: demo test test-all test-docs drift lint types docs bench fuzz soak matrix lock build release-check clean

demo: $(READY)  ## train a tiny ViLT for some steps with and without the loss
	$(BIN)/python -m examples.demo

test: lint types  ## lint, types and every behavior; the quick half alone: pytest -n 2 -m "not slow and not docs"
	$(PYTEST) -m "not docs"

test-docs: $(READY)  ## the rest: pages, workflows, benchmarks, packages
	$(PYTEST) -m docs

test-all: lint types  ## everything
	$(PYTEST)

drift:  ## what a new user meets today: the newest versions of everything
	rm -f .venv-newest/.ready
	$(MAKE) NEWEST=1 test

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

matrix: $(READY)  ## the quick tests on each supported version, or ONLY="newest": fills docs/reliability.md
	$(BIN)/python -m benchmarks.matrix $(if $(ONLY),"$(ONLY)")

lock: $(READY)  ## today's versions into constraints.txt, for all Pythons and systems
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
		--all-extras --no-annotate --no-emit-index-url --output-file constraints.txt pyproject.toml

release-check: $(READY)  ## build, check what PyPI will show, install the wheel alone in a fresh environment
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear build/release
	build/release/bin/python -m pip install --quiet dist/*.whl
	cd build && release/bin/python -c 'import attncongruence; print(attncongruence.__version__)'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade $(LOCKED) pip hatchling editables setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation $(LOCKED) --editable '.[hf,timm,lightning,viz,docs,dev]'
	touch $@

clean:
	rm -rf .venv .venv-newest dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

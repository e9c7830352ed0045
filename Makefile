# make setup | demo | lint | test-fast | test | docs | bench. PYTHON chooses the interpreter of .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo lint test-fast test docs bench clean

setup: $(STAMP)

# torch first, by itself: an index may hold CPU and GPU builds, and the pin decides for this machine's.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m sae_lab.train hydra.run.dir=outputs/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --verbose >$(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

# Every test that starts no process.
test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not process"

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The site, into build/site. A broken link or a missing reference fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup
	$(BIN)/python -m sae_lab.benchmark

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build/site

# Two commands do everything: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format clean
.DEFAULT_GOAL := demo

$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]'
	@touch $@

# pretrain rgb, flow and skeleton, distil, evaluate on the demo data; a second call does only what is missing
demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

# the whole test suite: two processes, each module in one of them, one thread each
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# lint, format and types: what CI runs before the tests
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf output data/demo .pytest_cache .mypy_cache .ruff_cache

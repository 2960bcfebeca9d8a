# `make demo` and `make test` are the two main commands. Every target installs into .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-fast check format docs lock clean
.DEFAULT_GOAL := demo

# requirements.lock fixes the versions of all dependencies
$(INSTALLED): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c requirements.lock -e '.[dev]'
	@touch $@

# pretrain rgb, flow and skeleton, distill and evaluate on the demo data; a second call runs only the missing stages
demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

# the complete test suite in two processes with one thread each
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# unit tests only: no training, no subprocess; the pre-push hook runs this
test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/unit $(PYTEST_ARGS)

# lint, format, types, spelling and generated docs: CI runs this before the tests
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -z | xargs -0 $(BIN)/codespell
	$(BIN)/python -m mmdistill.cli.config_reference --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# write docs/config.md from the schema
docs: $(INSTALLED)
	$(BIN)/python -m mmdistill.cli.config_reference

# write the installed versions into requirements.lock
lock: $(INSTALLED)
	{ head -n 1 requirements.lock; $(BIN)/python -m pip freeze --all | grep '^[^-#].*==' | grep -vE '^(mediapipe|mmdistill|pip|wheel)=='; } > requirements.new
	mv requirements.new requirements.lock

clean:
	rm -rf output data/demo .pytest_cache .mypy_cache .ruff_cache

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

CHROMIUM := { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install --yes chromium; } >/dev/null

.PHONY: setup demo test soak lint bench

setup: $(VENV)/dev

$(VENV)/run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/dev: $(VENV)/run
	$(INSTALL) --editable '.[dev]'
	command -v chromium >/dev/null || $(CHROMIUM) || echo "there is no Chromium: the tests of the page will be skipped"
	touch $@

demo: $(VENV)/run
	$(BIN)/llava ask examples/scene.png "How many things are there?"

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

soak: $(VENV)/dev
	$(INSTALL) --editable '.[dev,ray]'
	$(BIN)/python -m pytest -m soak

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.forward
	$(BIN)/python -m benchmarks.engine

# make demo   sets up .venv and runs the main job on the embedded default
# make test   sets up .venv, then format check, lint, types, tests
# make docs   the documentation's site, in site/; fails on a broken link
# make bench  the benchmarks that a CPU runs, with a table and a plot in bench/
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev
DOCS   := $(VENV)/.ready-docs

.PHONY: demo test test-slow docs bench check format clean

demo: $(READY)
	$(BIN)/lola-ft demo

# Where Python is told to keep no bytecode, every process would compile for half a minute.
export PYTHONDONTWRITEBYTECODE =

# Waiting threads sleep: beside other work, spinning ones make a small step up to ten times as long. Two processes of
# tests have two threads each. A file stays in one process, so that what its tests share is made once.
test test-slow: export OMP_WAIT_POLICY ?= PASSIVE

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(READY)
	$(BIN)/python benchmarks/bench.py

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What a user needs; with what the tests need besides; with what the site needs.
$(READY): pyproject.toml constraints.txt
	$(call install,.)
	touch $@

$(DEV): pyproject.toml constraints.txt
	$(call install,'.[dev]')
	touch $(READY) $@

$(DOCS): pyproject.toml constraints.txt
	$(call install,'.[docs]')
	touch $(READY) $@

# A module is compiled when it is first imported, not all of them here: a tenth of them is ever used.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch==2.13.0 -e $(1)
endef

clean:
	rm -rf $(VENV) runs .cache site

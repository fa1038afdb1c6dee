# make demo   sets up .venv and runs the main job on the embedded default
# make test   sets up .venv, then format check, lint, types, tests
# make bench  the benchmarks that a CPU runs, with a table and a plot in bench/
# Threads that wait asleep: spinning ones cost a shared machine ten times what they gain.
export OMP_WAIT_POLICY ?= PASSIVE
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-slow bench check format clean

demo: $(READY)
	$(BIN)/lola-ft demo

test: check
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

bench: $(READY)
	$(BIN)/python benchmarks/bench.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	# On all cores, and also where Python keeps no bytecode by itself: else every process compiles for half a minute.
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) runs .cache

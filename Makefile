# Two commands on a fresh machine: `make demo`, `make test`. Everything installs into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-slow lint bench clean

demo: .venv/.demo
	$(BIN)/noetherflow demo --out demo

# One thread per worker: with two each, the workers' threads wait for one another and the suite takes four times as long.
test: .venv/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.test
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch comes first and pinned, so that no later resolver step pulls another build.
.venv/.torch: .venv/bin/python constraints.txt
	$(PIP) torch==2.13.0
	@touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(PIP) -e '.[report,examples]'
	@touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(PIP) -e '.[report,examples,hf,lightning,track,sweep]' pytest pytest-xdist hypothesis selenium ruff==0.17.6 mypy==2.4.1
	@touch $@

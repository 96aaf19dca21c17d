# Two commands on a fresh machine: `make demo`, `make test`. Everything installs into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-slow lint bench mutants docs fuzz interrupts clean

demo: .venv/.demo
	$(BIN)/noetherflow demo --out demo

# One thread per worker: with two each, the workers' threads wait for one another and the suite takes four times as long.
test: .venv/.test .venv/.browser lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Slow (about half an hour on two cores); an interrupted run goes on where it was.
mutants: .venv/.test
	$(BIN)/python tests/mutants.py

# 3,000 random models through the whole library, about an hour; `tests/fuzz.py FIRST LAST` takes a part of the seeds.
fuzz: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py 0 3000

# Over 500 Ctrl-C and 200 SIGKILL in training and in balancing a file, some ten minutes.
interrupts: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/interrupts.py ctrl-c 0 20
	OMP_NUM_THREADS=1 $(BIN)/python tests/interrupts.py ctrl-c-file 0 250
	OMP_NUM_THREADS=1 $(BIN)/python tests/interrupts.py kill 0 75
	OMP_NUM_THREADS=1 $(BIN)/python tests/interrupts.py kill-file 0 130

bench: .venv/.test
	$(BIN)/python -m benchmarks

# The site in docs/_build, five scripts run on the way (2 minutes on a free core). Warnings are errors; nothing is fetched.
docs: .venv/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo "open docs/_build/index.html"

clean:
	rm -rf .venv demo docs/_build docs/gallery .pytest_cache .mypy_cache .ruff_cache .hypothesis

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

.venv/.docs: .venv/.torch pyproject.toml
	$(PIP) -e '.[report,examples,hf,docs]'
	@touch $@

# The run report is tested in a browser. Where apt cannot install one, that test alone is skipped, and says so.
.venv/.browser: .venv/bin/python
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium chromium-driver >/dev/null) || echo "no browser could be installed: its test will be skipped"; \
	else echo "no chromium and chromedriver here: the browser test will be skipped"; fi
	@touch $@

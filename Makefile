# `make demo` and `make test` are all a newcomer needs; both set up .venv when it is missing.
PYTHON ?= python3
CPU_THREADS ?= $(shell nproc)
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
DEMO = outputs/demo
# a third of the modules is ever imported: those are compiled when they first are, and the rest never (--no-compile)
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow lint format clean

demo: .venv/demo.installed
	$(BIN)/python training/demo.py data
	rm -rf $(DEMO)/checkpoint-*
	$(BIN)/accelerate launch --num_machines 1 --num_processes 1 --dynamo_backend no --mixed_precision no \
	  --num_cpu_threads_per_process $(CPU_THREADS) training/train_dtr.py --config training/presets/dtr_digits.yaml --output_dir $(DEMO)
	$(BIN)/python training/demo.py report

test: .venv/test.installed
	$(BIN)/python -m pytest -q

test-slow: .venv/test.installed
	$(BIN)/python -m pytest -q -m slow

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Expected Python 3.11 or newer, but got " + sys.version)'
	$(PYTHON) -m venv .venv

.venv/%.installed: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) -e ".[$*]"
	touch $@

clean:
	rm -rf .venv outputs

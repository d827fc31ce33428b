# What a developer does with FastServe. Needs Python 3.10 to 3.13 (3.11 is what CI runs) with venv, and make.

PYTHON := $(or $(shell command -v python3.11 || command -v python3),python3)
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: setup serve test soak lint load configs clean

setup: $(STAMP)

# Done once, and again when what is installed changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) with venv is missing: install python3.11 and python3.11-venv (Debian, Ubuntu)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev,load]' --constraint constraints.txt
	touch $@

# exec: Ctrl-C and SIGTERM reach the server's launcher itself. ARGS="--http-port 8080 --model DIR"
serve: setup
	@exec $(BIN)/fastserve serve $(ARGS)

# ARGS="tests/launcher -k ports"
test: setup
	$(BIN)/python -m pytest $(ARGS)

soak: setup
	$(BIN)/python -m pytest --soak --timeout 3600 $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/interrogate backend kernels client

# A minute against a server that runs; leaves load_tests/report.html. ARGS="--users 32 --run-time 2m"
load: setup
	$(BIN)/locust --config load_tests/locust.conf $(ARGS)

# The model repository's config.pbtxt files, after a change of backend/fastserve/ensemble/api_tensors.py.
configs: setup
	$(BIN)/python -m fastserve.ensemble.model_configs model_repository

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

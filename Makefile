# Every target sets up .venv first if it needs to; `make help` lists them.
# ARGS is passed on, for example: make test ARGS="-k gates"

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
BIN := .venv/bin

# Reads the system's certificates, so that uv works behind a company proxy and
# in an environment that names no certificate file.
LOCK := UV_SYSTEM_CERTS=1 $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	--no-header --no-annotate --no-emit-index-url
CODE := $(wildcard src tests scripts examples benchmarks)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format lock wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: ## Create .venv with everything for use, tests and checks (PYTHON=python3.12 picks one)
	@PYTHON="$(PYTHON)" bash scripts/setup.sh

quickstart: setup ## Train a small network on the digits data (ARGS="..." for its options)
	$(BIN)/skipnet train digits $(ARGS)

test: setup ## Run the tests (ARGS="-m 'not slow'" for the quick ones, WORKERS=0 for one process)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: setup ## Lint, formatting and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: setup ## Format the code and fix what the linter can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

lock: setup ## Pin the dependencies again after a change in pyproject.toml (ARGS=--upgrade for newer ones)
	$(LOCK) $(ARGS) --extra onnx --extra report --extra dev pyproject.toml -o requirements/dev.txt
	$(LOCK) $(ARGS) --constraints requirements/dev.txt pyproject.toml -o requirements/core.txt

wheel: setup ## Build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean: ## Remove .venv, caches and built files (runs/ and .data/ stay)
	rm -rf .venv .setup.log dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

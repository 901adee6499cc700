# Every target but help and clean sets up what it needs: Debian packages as root, Python ones in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check cdefs bench clean packages

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(SETUP)  ## set everything up, probe this host, bring a guest up on it
	@scripts/demo

test: $(SETUP)  ## set everything up and run every test: unit, host
	$(BIN)/python -m pytest tests

check: $(SETUP)  ## lint, format, types, unit tests: under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit

cdefs: $(SETUP)  ## write what is generated: kvmpriv/cdefs from cdefs/, the ready guest from its source
	$(BIN)/python scripts/cdefs
	$(BIN)/python scripts/ready-guest

bench: $(SETUP)  ## the benchmarks, each beside C or plain Python: a table, and bench.json
	$(BIN)/python scripts/bench/run.py

clean:  ## remove what make has made here
	rm -rf $(VENV) build dist bench.json .mypy_cache .ruff_cache .pytest_cache .hypothesis

packages:
	@scripts/packages $(PYTHON)

$(SETUP): pyproject.toml | packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

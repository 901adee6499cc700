# Every target but help and clean sets up what it needs: Debian packages as root, Python ones in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-debug test-literal soak calibrate check kernels cdefs manual docs bench clean packages

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(SETUP)  ## set everything up, probe this host, bring a guest up on it
	@scripts/demo

test: kernels  ## set everything up and run every test: unit, host, the suite in both kernels
	$(BIN)/python -m pytest tests/unit tests/host tests/guest tests/private
	KVMPRIV_REQUIRE=restrictedmem,guest_memfd $(BIN)/python -m pytest tests/vm
	scripts/suite restrictedmem
	scripts/suite restrictedmem --append kvm.tdp_mmu=0
	scripts/suite guest_memfd

test-debug: $(SETUP)  ## the suite under the debug kernels, with a clean log (an hour and more)
	scripts/suite restrictedmem --debug
	scripts/suite restrictedmem --debug --append kvm.tdp_mmu=0
	scripts/suite guest_memfd --debug

test-literal: $(SETUP)  ## v9 unmended, held to the suite: it names the known defects, and nothing else fails
	scripts/literal

soak: kernels  ## the model against each kernel, an hour each (HOURS=, STEPS=, SEED=, ARTIFACTS=)
	scripts/soak restrictedmem
	scripts/soak guest_memfd

calibrate: kernels  ## our suite beside the kernel's own C selftests, case by case
	scripts/kernel/calibrate

check: $(SETUP)  ## lint, format, types, unit tests: under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit

kernels: $(SETUP)  ## build the kernels, or find them in the cache (~/.cache/kvmpriv)
	scripts/kernel/build restrictedmem
	scripts/kernel/build guest_memfd

cdefs: $(SETUP)  ## write what is generated: kvmpriv/cdefs from cdefs/, the ready guest from its source
	$(BIN)/python scripts/generate/cdefs.py
	$(BIN)/python scripts/generate/guests.py

manual: $(SETUP)  ## write the manual pages and shell completions from the commands' parsers
	$(BIN)/python scripts/generate/pages.py

docs: $(SETUP)  ## the API reference from the docstrings, in build/docs; a warning is an error
	$(BIN)/python scripts/generate/reference.py

bench: $(SETUP)  ## the benchmarks, each beside C or plain Python: a table, and bench.json
	$(BIN)/python scripts/launch.py bench.run

clean:  ## remove what make has made here
	rm -rf $(VENV) build dist bench.json .mypy_cache .ruff_cache .pytest_cache .hypothesis

packages:
	@scripts/packages $(PYTHON)

$(SETUP): pyproject.toml | packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

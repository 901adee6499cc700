# Each target sets up what it needs: Debian packages (as root), and Python packages in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-variants test-in-place test-debug test-literal test-all soak calibrate mutate check check-static \
	check-unit kernels browser cdefs manual docs bench clean packages

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(SETUP)  ## probe this host, and run a guest and Linux in private memory, here or in a VM
	@scripts/demo

test: kernels browser  ## unit and host tests, the suite in v9's and in the newest kernel (under an hour)
	KVMPRIV_REQUIRE="$${KVMPRIV_REQUIRE:+$$KVMPRIV_REQUIRE,}browser" \
		$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit
	$(BIN)/python -m pytest tests/host tests/guest tests/private
	KVMPRIV_REQUIRE=restrictedmem,guest_memfd $(BIN)/python -m pytest tests/vm
	scripts/suite restrictedmem
	scripts/suite guest_memfd

test-variants: $(SETUP)  ## the suite in v9's kernel with KVM's other MMU, and in Linux 6.12
	scripts/suite restrictedmem --append kvm.tdp_mmu=0
	scripts/suite guest_memfd-6.12

test-in-place: $(SETUP)  ## the suite in our kernel of conversion in place, switched on and off
	scripts/suite guest_memfd-in-place --append kvm.gmem_in_place_conversion=1
	scripts/suite guest_memfd-in-place

test-debug: $(SETUP)  ## the suite in the debug kernels, whose log must stay clean (hours)
	scripts/suite restrictedmem --debug
	scripts/suite restrictedmem --debug --append kvm.tdp_mmu=0
	scripts/suite guest_memfd --debug
	scripts/suite guest_memfd-6.12 --debug
	scripts/suite guest_memfd-in-place --debug --append kvm.gmem_in_place_conversion=1

test-literal: $(SETUP)  ## the suite on v9 as posted: it must find the known defects, and nothing else
	scripts/literal

test-all: test test-variants test-in-place test-debug test-literal calibrate mutate  ## all of these, one after the other (many hours)

soak: kernels  ## the model of private memory against each kernel, an hour each (HOURS=, STEPS=, SEED=, ARTIFACTS=)
	scripts/soak restrictedmem
	scripts/soak guest_memfd
	scripts/soak guest_memfd-in-place --append kvm.gmem_in_place_conversion=1

calibrate: kernels  ## our suite beside the kernel's own C selftests, case by case
	scripts/kernel/calibrate

mutate: $(SETUP)  ## break the kernel series, one line at a time: a test must fail each time (hours)
	scripts/kernel/mutate
	scripts/kernel/mutate --kernel guest_memfd-in-place

# The unit tests wait for other processes often: beside them there is time for the types.
check: $(SETUP)  ## lint, format, types and unit tests (about a minute)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target check-unit check-static

check-static:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-unit:
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit

kernels: $(SETUP)  ## build the kernels of `make test`, or find them in the cache (~/.cache/kvmpriv)
	scripts/kernel/build restrictedmem
	scripts/kernel/build guest_memfd

browser: $(SETUP)  ## install Chromium (about 100 MB), in which `make test` looks at a page
	$(BIN)/python scripts/launch.py kbuild.packages browser

cdefs: $(SETUP)  ## generate kvmpriv/cdefs from the headers in cdefs/, and the ready-made guests
	$(BIN)/python scripts/generate/cdefs.py
	$(BIN)/python scripts/generate/guests.py

manual: $(SETUP)  ## generate the manual pages and shell completions from the commands' parsers
	$(BIN)/python scripts/generate/pages.py

docs: $(SETUP)  ## generate the API reference into build/docs; a warning is an error
	$(BIN)/python scripts/generate/reference.py

bench: $(SETUP)  ## run the benchmarks, each beside C or plain Python: a table, and bench.json
	$(BIN)/python scripts/launch.py bench.run

clean:  ## remove what make has created here
	rm -rf $(VENV) build dist bench.json .mypy_cache .ruff_cache .pytest_cache .hypothesis

packages:
	@scripts/packages $(PYTHON)

$(SETUP): pyproject.toml | packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

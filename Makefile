# Each target sets up what it needs: Debian packages (as root), and Python packages in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
comma  := ,
SETUP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-variants test-in-place test-distribution test-debug test-literal test-all test-host test-private test-vm soak calibrate mutate check \
	check-static check-unit kernels browser cdefs manual docs bench clean packages

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 19

demo: $(SETUP)  ## probe this host, and run a guest and Linux in private memory, here or in a VM
	@scripts/demo

# `check` has the unit tests; in `make check test` it runs once.
test: export KVMPRIV_REQUIRE := $(if $(KVMPRIV_REQUIRE),$(KVMPRIV_REQUIRE)$(comma))browser
test: browser check kernels  ## check, tests here and in VMs, the suite in v9's and the newest kernel (35 min, and 20 to build)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target \
		test-suite-restrictedmem test-suite-guest_memfd test-host test-private
	@$(MAKE) --no-print-directory test-vm

# A VM uses one processor, and the host's tests wait often: two of these run at a time.
test-suite-%:
	scripts/suite $*

test-host:
	$(BIN)/python -m pytest tests/host

test-private:
	$(BIN)/python -m pytest tests/guest tests/private

# Tests that share a VM name it as their xdist_group, and run in one process.
VM_TESTS = KVMPRIV_REQUIRE=restrictedmem,guest_memfd $(BIN)/python -m pytest -n 2 --dist loadgroup --durations=15 tests/vm

test-vm:
	$(VM_TESTS) -m "not second_kernel"

test-variants: kernels  ## tests of VMs in a second kernel, the suite with KVM's other MMU and in Linux 6.12
	$(VM_TESTS) -m second_kernel
	scripts/suite restrictedmem --append kvm.tdp_mmu=0
	scripts/suite guest_memfd-6.12

test-in-place: $(SETUP)  ## the suite in our kernel of conversion in place, switched on and off
	scripts/suite guest_memfd-in-place --append kvm.gmem_in_place_conversion=1
	scripts/suite guest_memfd-in-place
	KVMPRIV_REQUIRE=guest_memfd_in_place $(BIN)/python -m pytest tests/vm/in_place.py

test-debug: $(SETUP)  ## the suite in the debug kernels, whose log must stay clean (hours)
	scripts/suite restrictedmem --debug
	scripts/suite restrictedmem --debug --append kvm.tdp_mmu=0
	scripts/suite guest_memfd --debug
	scripts/suite guest_memfd-6.12 --debug
	scripts/suite guest_memfd-in-place --debug --append kvm.gmem_in_place_conversion=1

test-distribution: kernels  ## Debian, made from its own packages, as a guest of those kernels (an hour; root)
	KVMPRIV_REQUIRE=distribution,restrictedmem,guest_memfd $(BIN)/python -m pytest tests/vm/test_distribution.py

test-literal: $(SETUP)  ## the suite on v9 as posted: it must find the known defects, and nothing else
	scripts/literal

test-all: test test-variants test-in-place test-distribution test-debug test-literal calibrate mutate  ## all of these, one after the other (many hours)

soak: kernels  ## the model of private memory against each kernel, an hour each (HOURS=, STEPS=, SEED=, ARTIFACTS=)
	scripts/soak restrictedmem
	scripts/soak guest_memfd
	scripts/soak guest_memfd-in-place --append kvm.gmem_in_place_conversion=1

calibrate: kernels  ## our suite beside the kernel's own C selftests, case by case
	scripts/kernel/calibrate

mutate: $(SETUP)  ## break the kernels, one line at a time, and put back past bugs: a test must fail each time (hours)
	scripts/kernel/mutate
	scripts/kernel/mutate --kernel guest_memfd
	scripts/kernel/history
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

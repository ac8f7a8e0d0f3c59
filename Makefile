# tdxhw: every target sets up what it needs. `make test` is the whole gate; CI runs the same.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.set-up
SUITES ?=
N      ?= 100000
LAB    ?= tests/lab

.DEFAULT_GOAL := help
.PHONY: help setup run test test-lab lint bench ioctls payloads uapi-headers tdx-kernel clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv with everything in it, tdxhw too

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh tools/setup.sh
	@touch $@

run: $(STAMP) ## Run the suites on the simulated /dev/kvm (SUITES="td_lifecycle ..." for some)
	$(BIN)/tdxhw run --on sim $(SUITES)

lint: $(STAMP) ## ruff, mypy --strict, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP) lint ## The whole gate: lint, then every test
	$(BIN)/pytest -n 2 --dist loadgroup -m "not lab" tests
	$(BIN)/tdxhw run --on sim

test-lab: $(STAMP) tdx-kernel .cache/uapi-headers/provenance.txt ## The lab: sshds, Ansible, BMCs, kernels in emulated VMs (root; LAB=tests/lab/test_power.py for a part)
	sh tools/lab_packages.sh
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt labgrid
	TDXHW_LAB_TESTS=required $(BIN)/pytest -m lab -o faulthandler_timeout=0 --durations=10 $(LAB)

ioctls: $(STAMP) ## Random ioctls on simulated TDs, with every invariant checked (N=100000: two minutes)
	TDXHW_IOCTLS=$(N) $(BIN)/pytest -q -s -o faulthandler_timeout=0 tests/properties/test_ioctl_sequences.py

bench: $(STAMP) ## Measure the hot paths, each as a ratio within one run
	$(BIN)/python -m bench

uapi-headers: ## Fetch kernel headers with KVM_TDX_* for the layout tests (Debian; nothing is installed)
	$(PYTHON) -m tools.fetch_uapi_headers

.cache/uapi-headers/provenance.txt:
	$(PYTHON) -m tools.fetch_uapi_headers

tdx-kernel: ## Build the kernels of the lab's tests, cached by configuration (Debian; ten minutes the first time)
	$(PYTHON) -m tools.tdx_kernel $(KERNELS)

payloads: $(STAMP) ## Rebuild the guest payloads from their .S sources (needs binutils)
	$(BIN)/python -m tdxhw.guest.build

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

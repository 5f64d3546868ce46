# `make demo` and `make test` set up what they need. See README.md.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Inherited by every process we start: without bytecode each of them would compile its imports again.
unexport PYTHONDONTWRITEBYTECODE
unexport FEDTIDE_HOME
unexport FEDTIDE_SERVER

DEPENDENCIES := $(shell cat pyproject.toml examples/data-requirements.txt | sha256sum | cut -c1-16)
READY := $(VENV)/.dependencies-$(DEPENDENCIES)
LINKED := $(VENV)/.linked-$(shell pwd | sha256sum | cut -c1-16)

.PHONY: setup demo test test-slow test-flwr faults lint docs bench clean

setup: $(READY) $(LINKED)

$(READY):
	@test -n "$(PYTHON)" || { echo "fedtide needs Python 3.11 or newer: apt-get install python3 python3-venv"; exit 1; }
	@test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV) || { echo "cannot make a virtual environment: apt-get install python3-venv"; exit 1; }
	python -m pip install --quiet --no-compile --disable-pip-version-check "setuptools>=77" wheel
	python -m pip install --quiet --no-compile --disable-pip-version-check "$(TORCH)" ".[dev]"
	python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -r examples/data-requirements.txt
	python -m pip uninstall --quiet --yes fedtide
	@rm -f $(VENV)/.dependencies-* $(VENV)/.linked-*
	@touch $@

$(LINKED): $(READY)
	python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.linked-*
	@touch $@

demo: setup
	fedtide demo $(if $(TRAIN),--train $(TRAIN))

lint: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports

BUBBLEWRAP ?= /usr/bin/bwrap
$(BUBBLEWRAP):
	apt-get install --yes --no-install-recommends bubblewrap || echo "the sandbox is tried without namespaces: as root, apt-get install bubblewrap"

# A suite that hangs ends with the stacks of its threads: twice its limit is no slow machine.
test: lint $(BUBBLEWRAP)
	timeout --signal=ABRT 1500 python -m pytest --durations 25

CHROMIUM ?= /usr/bin/chromium
$(CHROMIUM):
	apt-get install --yes --no-install-recommends chromium || { echo "the page is tried in a browser: as root, apt-get install chromium"; exit 1; }

PROMETHEUS ?= /usr/bin/prometheus
$(PROMETHEUS):
	apt-get install --yes --no-install-recommends prometheus || { echo "rules and gates are tried on a real Prometheus: as root, apt-get install prometheus"; exit 1; }

NPM ?= /usr/bin/npm
$(NPM):
	apt-get install --yes --no-install-recommends nodejs npm || { echo "logins are tried at a real OpenID provider: as root, apt-get install nodejs npm"; exit 1; }

REGISTRY ?= /usr/bin/docker-registry
$(REGISTRY):
	apt-get install --yes --no-install-recommends docker-registry || { echo "releases are pushed to a real registry: as root, apt-get install docker-registry"; exit 1; }

SOFTHSM ?= /usr/bin/softhsm2-util
$(SOFTHSM):
	apt-get install --yes --no-install-recommends softhsm2 || { echo "keys are tried on a token: as root, apt-get install softhsm2"; exit 1; }

# A kernel as a process: what it delegates to an agent no machine of a test has to give.
UML ?= /usr/bin/linux.uml
$(UML):
	apt-get install --yes --no-install-recommends user-mode-linux || { echo "cgroups are tried on a kernel of their own: as root, apt-get install user-mode-linux"; exit 1; }

test-slow: setup $(BUBBLEWRAP) $(CHROMIUM) $(PROMETHEUS) $(NPM) $(REGISTRY) $(SOFTHSM) $(UML)
	CHROMIUM=$(CHROMIUM) python -m pytest -m slow

# The same apps on each minor version of Flower that is supported.
FLWR ?= 1.41 1.42
test-flwr: setup
	@for version in $(FLWR); do \
		python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .flwr/$$version "flwr==$$version.*" \
		&& PYTHONPATH=$(abspath .flwr)/$$version python -m pytest tests/fidelity tests/integration/test_flower_bridge.py tests/integration/test_flower_zoo.py \
		|| exit 1; done

# What the pages say about types is written from the types.
docs: setup
	python docs/generate.py

SEED ?= 1
POINTS ?= 10
faults: setup
	python -m tests.faults.campaign --seed $(SEED) --points $(POINTS)

bench: setup
	@test -n "$(NAME)" || { echo "usage: make bench NAME=...; there are: $$(ls benchmarks | sed -n 's/^bench_\(.*\)\.py$$/\1/p' | tr '\n' ' ')"; exit 2; }
	python -m benchmarks.bench_$(NAME)

clean:
	rm -rf .fedtide .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

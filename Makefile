# Two commands do all the set-up: `make demo` and `make test`. Python 3.11 and a Debian or Ubuntu are enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ENGINE_VENV := .venv-vllm
VLLM_VERSION ?= 0.32.0
ENGINE ?= replay
FUZZ_SECONDS ?= 120

# In the window, and before the grammar stop: what `make test-versions` runs on each.
OLDER_VERSIONS ?= 0.31.0 0.28.0
VERSION_TESTS_0.31.0 := tests/plugin tests/end_to_end/test_tagged.py tests/end_to_end/test_versions.py \
	tests/properties/test_detokenize.py tests/properties/test_tagger.py
VERSION_TESTS_0.28.0 := tests/plugin/test_on_the_engine.py tests/plugin/test_sidecar_gone.py \
	tests/end_to_end/test_tagged.py tests/end_to_end/test_versions.py

.PHONY: help demo test servers check lint types imports soak test-versions test-version bench bench-front-end engine clean

help:
	@echo "make demo              stream an answer in the terminal, from an embedded engine"
	@echo "make demo ENGINE=vllm  the same from the real vLLM (CPU) and a tiny model made on the spot"
	@echo "make test              everything that must pass: lint, types, import contracts, tests with the real engine"
	@echo "make soak              the long runs: many more generated cases"
	@echo "make test-versions     the plugin on older versions of vLLM, really run"
	@echo "make bench             the figures, in ratios from one run"
	@echo "make bench-front-end   the same for vLLM's front end with and without the plugin"

demo: $(VENV)/.installed
ifeq ($(ENGINE),vllm)
	@$(MAKE) --no-print-directory engine
	@$(BIN)/python examples/tiny_vllm/demo.py
else
	@$(BIN)/penstock demo
endif

test: servers $(VENV)/.installed-test engine check
	$(BIN)/python -m pytest

# The real Redis, nginx and HAProxy that the tests run against.
servers:
	@PYTHON=$(PYTHON) tests/system_packages.sh tests

check: lint types imports

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

imports: $(VENV)/.installed-test
	$(BIN)/lint-imports

soak: servers $(VENV)/.installed-test engine
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest tests/properties tests/end_to_end tests/fuzz tests/chaos \
	  tests/shell/test_cuts.py tests/shell/test_ledgers.py tests/shell/test_calls_run_once.py -m "soak or not soak"
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	cd tests && for border in fuzz/corpus/*; do \
	  ../$(BIN)/python -m fuzz.coverage_guided $$(basename $$border) $(FUZZ_SECONDS) || exit 1; done

# Older versions of vLLM, each in an environment of its own: what works on them is what the window promises.
test-versions:
	@for version in $(OLDER_VERSIONS); do \
	  $(MAKE) --no-print-directory test-version VLLM_VERSION=$$version ENGINE_VENV=.venv-vllm-$$version || exit 1; \
	done

test-version: $(VENV)/.installed-test engine
	PENSTOCK_VLLM_PYTHON=$(CURDIR)/$(ENGINE_VENV)/bin/python $(BIN)/python -m pytest $(VERSION_TESTS_$(VLLM_VERSION))

bench-front-end: $(VENV)/.installed-test engine
	$(BIN)/python bench/front_end.py

bench: $(VENV)/.installed-test
	$(BIN)/python bench/cpu_per_token.py

# The real engine lives in its own environment, as it does in production: the sidecar never imports it.
engine: $(ENGINE_VENV)/.installed-$(VLLM_VERSION)

$(ENGINE_VENV)/.installed-$(VLLM_VERSION):
	PYTHON=$(PYTHON) examples/tiny_vllm/install.sh $(ENGINE_VENV) $(VLLM_VERSION)
	@touch $@

$(VENV)/bin/python:
	@PYTHON=$(PYTHON) tests/system_packages.sh venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(ENGINE_VENV) .engine build dist

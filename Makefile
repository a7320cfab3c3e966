# Two commands do all the set-up: `make demo` and `make test`. Python 3.11 and a Debian or Ubuntu are enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ENGINE_VENV := .venv-vllm
VLLM_VERSION ?= 0.32.0
ENGINE ?= replay
FUZZ_SECONDS ?= 120

.PHONY: help demo test servers check lint types imports soak bench engine clean

help:
	@echo "make demo              stream an answer in the terminal, from an embedded engine"
	@echo "make demo ENGINE=vllm  the same from the real vLLM (CPU) and a tiny model made on the spot"
	@echo "make test              everything that must pass: lint, types, import contracts, tests with the real engine"
	@echo "make soak              the long runs: many more generated cases"
	@echo "make bench             the figures, in ratios from one run"

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
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest tests/properties tests/end_to_end tests/fuzz tests/shell/test_ledgers.py tests/shell/test_tool_loop.py -m "soak or not soak"
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	cd tests && for border in fuzz/corpus/*; do \
	  ../$(BIN)/python -m fuzz.coverage_guided $$(basename $$border) $(FUZZ_SECONDS) || exit 1; done

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

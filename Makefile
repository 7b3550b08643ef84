# bimo: set up, run, test, check, bench. `make help` lists the targets.
#
#   make run MODEL=smollm2 PORT=8000        another model or port
#   make test TESTS="tests/formats -k gguf" some of the tests
#   make setup PYTHON=/path/to/python3.12   another interpreter
#   make setup PIP_ARGS="..."               more options for pip; where the package index has only the CUDA build
#                                           of torch, name PyTorch's CPU index here with --extra-index-url

VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= smollm2
HOST ?= 127.0.0.1
PORT ?= 8000
WORKERS ?= 2
TESTS ?= tests
PIP_ARGS ?=
BENCH ?=

# The first interpreter that works (a shim may not), is Python 3.11 or newer, and can make environments.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
    $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)

PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt $(PIP_ARGS)
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup run test check bench sanitize docs clean distclean chromium model

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(VENV)/.installed $(VENV)/.kernels ## make .venv and install bimo with the pinned packages

run: setup ## fetch the model (once), start the server, print the address of the chat page
	@$(BIN)/bimo serve $(MODEL) --host $(HOST) --port $(PORT) || test $$? -eq 130 # Ctrl-C is how it ends

test: $(VENV)/.installed-test $(VENV)/.kernels chromium model ## set up what the tests need, and run all of them (WORKERS, TESTS)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

check: $(VENV)/.installed-dev ## ruff, mypy, architecture
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(VENV)/.installed-bench $(VENV)/.kernels ## measure bimo and its peers on this machine, printed as ratios (BENCH="--quick")
	$(BIN)/python -m benchmarks.run $(if $(strip $(PIP_ARGS)),--pip-args="$(PIP_ARGS)") $(BENCH)

sanitize: $(VENV)/.installed-test ## build the kernels with address and undefined-behaviour sanitizers, and run their tests
	$(PIP_INSTALL) --quiet --no-deps --build-constraint constraints.txt --target build/sanitized --upgrade \
	  --config-settings=cmake.define.BIMO_SANITIZE=ON --config-settings=build-dir=build/sanitize ./kernels
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=build/sanitized $(BIN)/python -m pytest -p no:xdist --timeout 1800 tests/engine/test_fused.py tests/engine/test_kernels.py \
	  tests/engine/test_multistep.py tests/engine/test_adapters.py tests/models/test_fused_training.py

docs: $(VENV)/.installed ## write the generated pages of docs/
	$(BIN)/python docs/generate_cli.py

clean: ## remove caches and build products (models stay in the cache folder, `bimo models` shows it)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis test-results *.egg-info
	find . \( -path ./$(VENV) -o -path ./benchmarks/.peers \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and the environments of the peers that `make bench` made
	rm -rf $(VENV) benchmarks/.peers

# --- what the targets above stand on; stamp files make a second run instant ---

$(VENV)/.created: constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with the venv module: apt-get install python3 python3-venv, or make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP_INSTALL) --quiet --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(PINS)
	@echo "installing bimo and the packages of constraints.txt (some minutes the first time)"
	@$(PIP_INSTALL) --build-constraint constraints.txt -e .
	@touch $@

# The C++ kernels make generation faster; without a compiler bimo runs on plain torch.
$(VENV)/.kernels: $(VENV)/.installed $(wildcard kernels/* kernels/src/* kernels/bimo_kernels/*.py)
	@if command -v c++ >/dev/null || command -v g++ >/dev/null; then \
	  echo "building the C++ kernels"; \
	  $(PIP_INSTALL) --quiet --no-deps --build-constraint constraints.txt ./kernels \
	  || echo "warning: the C++ kernels could not be built, bimo runs without them, slower; the compiler's words stand above" >&2; \
	else echo "note: no C++ compiler, so bimo runs without its kernels, slower; mend: apt-get install g++, then make setup" >&2; fi
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "installing what '$*' needs"
	@$(PIP_INSTALL) --build-constraint constraints.txt -e '.[$*]'
	@touch $@

# The page's tests drive a real browser: Debian's Chromium. Without it they are skipped, each by name.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then as_root=; elif sudo -n true 2>/dev/null; then as_root=sudo; else as_root=no; fi; \
	  if [ "$$as_root" = no ] || ! command -v apt-get >/dev/null; then \
	    echo "warning: no Chromium, and no right to install it here: the page's tests will be skipped by name; mend: apt-get install chromium" >&2; \
	  else echo "installing Chromium for the page's tests"; \
	    { $$as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	    || echo "warning: apt-get could not install Chromium: the page's tests will be skipped by name" >&2; fi; }

# Without the model (no network) the tests that need it are skipped, each by name.
model: $(VENV)/.installed
	@$(BIN)/bimo models --fetch smollm2 >/dev/null || echo "warning: smollm2 could not be fetched: the tests that need it will be skipped by name" >&2

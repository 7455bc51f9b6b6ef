# Two commands do everything on a fresh Linux machine with Python, a C++ compiler and make:
#   make demo    install, export the embedded model for a Jetson, ask it three questions about an image
#   make test    install, linters, type checker, tests
# A third for the time in between:
#   make quick   the tests that take under three minutes on two cores
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := bundles/demo
IMAGE := cobra_edge/mini/demo.png
RUNTIME := $(wildcard runtimes/cpu/*.h runtimes/cpu/*.cpp runtimes/cpu/*.inl)
CUDA := $(wildcard runtimes/cuda/*.cu runtimes/cuda/*.cuh)
# What an installation is made from: when one of these changes, it is made again.
SOURCES := pyproject.toml CMakeLists.txt runtimes/cpu/CMakeLists.txt $(RUNTIME) runtimes/cuda/CMakeLists.txt runtimes/cuda/compile.py $(CUDA)

# Bytecode is cached even where the environment forbids it, as container images do: each process would compile all libraries again.
export PYTHONDONTWRITEBYTECODE :=

GPU_CASES = gemv gemm scan rows step_kernels sampling_kernels decoder
.PHONY: demo docs test quick lint check constraints test-latest test-lowest test-gpu test-cuda-bindings test-sanitize test-arm64 \
  test-old-x86 test-device test-old-userland wheels drift-bundle drift-history check-tag github-release figures budgets clean

# Exact versions of everything installed below: constraints/, made by `make constraints`. pyproject.toml declares the ranges.
# Compiling every module of every library takes most of a minute; Python compiles what is imported.
PYTHON_VERSION := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
CONSTRAINTS := constraints/python$(PYTHON_VERSION).txt
PIP_INSTALL = $(BIN)/pip install --quiet --no-compile --constraint $(CONSTRAINTS) --build-constraint constraints/build.txt

constraints/python%.txt:
	@echo "make: no constraints for Python $*: take one that has them (make PYTHON=python3.12 ...), or make test-latest" >&2; exit 2

$(VENV)/pip: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) pip
	touch $@

$(VENV)/export: $(VENV)/pip $(SOURCES)
	@echo "installing cobra-edge with its export extra; torch is large, this takes some minutes the first time"
	$(PIP_INSTALL) -e ".[export]"
	touch $@

$(VENV)/dev: $(VENV)/pip $(SOURCES)
	@echo "installing cobra-edge with its dev extra; torch is large, this takes some minutes the first time"
	$(PIP_INSTALL) -e ".[dev]"
	touch $@ $(VENV)/export $(VENV)/docs

$(VENV)/docs: $(VENV)/pip $(SOURCES)
	$(PIP_INSTALL) -e ".[docs]"
	touch $@

demo: $(VENV)/export
	$(BIN)/cobra-edge export --target jetson --out $(DEMO) --force
	@echo; echo "the image: $(IMAGE)"
	@for question in "What is in the image?" "How many objects are there?" "Is there a red circle?"; do \
	  echo; echo "> $$question"; \
	  $(BIN)/cobra-edge run $(DEMO) --image $(IMAGE) --prompt "$$question" || exit $$?; \
	done

# The documentation as a site, build/site/index.html. The variable silences the theme's notice of its own future.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What GitHub reads is checked by its schemas and by zizmor, for what a pull request of a stranger could do with it.
CHECK_SCHEMA := $(BIN)/check-jsonschema --quiet --builtin-schema vendor.github
lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(RUNTIME) $(CUDA) $(wildcard tests/emulated/*.cpp tests/emulated/*.h)
	$(BIN)/mypy
	$(BIN)/hadolint export/containers/Dockerfile
	$(CHECK_SCHEMA)-workflows .github/workflows/*.yml
	$(CHECK_SCHEMA)-actions action.yml
	$(CHECK_SCHEMA)-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(CHECK_SCHEMA)-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --no-progress --quiet .

# A process for each core, each of one thread: twice as fast as one process whose libraries take all cores.
# A process that crashes ends the run: xdist would start another one for the same test, again and again.
PYTEST_OPTIONS := -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart=0 --durations=25
check: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_OPTIONS)

# All tests but the slow ones (SLOW in tests/conftest.py).
quick: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" $(PYTEST_OPTIONS)

# Side by side: a linter uses the core that a test leaves while it waits.
test: $(VENV)/dev
	$(MAKE) --no-print-directory --jobs=2 lint check

# What needs an NVIDIA GPU, and the kernels' and the decoder's tests by the real driver. bench/gpu.sh has them and the measurements.
test-gpu: $(VENV)/dev
	$(BIN)/pytest -m gpu -rs tests
	COBRA_REAL_GPU=1 $(BIN)/pytest -rs $(addprefix tests/emulated/test_,$(addsuffix .py,$(GPU_CASES)))

# The native decoder against its naive references, and cobra-mini against the numpy decoder, without Python: under sanitizers; on an
# emulated 64-bit ARM with and without the dot product instructions; on an emulated x86 that has no AVX. The last two need Debian's
# qemu-user, the ARM also g++-aarch64-linux-gnu.
CASES := build/cases
$(CASES)/done: $(VENV)/export tests/decode/native_case.py
	$(BIN)/python -m tests.decode.native_case $(CASES)
	touch $@

SELFTEST := -DCOBRA_SELFTEST=ON -DCMAKE_BUILD_TYPE=Release

test-sanitize: $(CASES)/done
	cmake -S . -B build/sanitize $(SELFTEST) -DCOBRA_SANITIZE=ON
	cmake --build build/sanitize --parallel
	build/sanitize/runtimes/cpu/selftest $(CASES)/*.bin

test-arm64: $(CASES)/done
	cmake -S . -B build/arm64 $(SELFTEST) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/arm64 --parallel
	for cpu in cortex-a72 cortex-a76; do \
	  qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu $$cpu build/arm64/runtimes/cpu/selftest $(CASES)/*.bin || exit $$?; \
	done

test-old-x86: $(CASES)/done
	cmake -S . -B build/old-x86 $(SELFTEST)
	cmake --build build/old-x86 --parallel
	qemu-x86_64 -cpu Nehalem build/old-x86/runtimes/cpu/selftest $(CASES)/*.bin

# The newest releases that the declared ranges allow, for each Python; what is held back, and why, is in constraints/held.txt.
UV_COMPILE = $(BIN)/uv pip compile --quiet --upgrade --no-annotate --custom-compile-command "make constraints" \
  --constraint constraints/held.txt
X86_64 := --python-platform x86_64-manylinux_2_28
JETSON := --python-platform aarch64-manylinux_2_35

constraints: $(VENV)/pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) uv
	for v in 3.10 3.11 3.12 3.13; do \
	  $(UV_COMPILE) pyproject.toml constraints/tools.in --extra dev --python-version $$v $(X86_64) -o constraints/python$$v.txt || exit $$?; \
	done
	$(UV_COMPILE) pyproject.toml constraints/tools.in --extra jetpack6 --extra serve --python-version 3.10 $(JETSON) -o constraints/jetpack6.txt
	$(UV_COMPILE) pyproject.toml constraints/tools.in --extra jetpack7 --extra serve --python-version 3.12 $(JETSON) -o constraints/jetpack7.txt
	$(UV_COMPILE) constraints/build.in --python-version 3.10 $(X86_64) -o constraints/build.txt

# The tests with the newest releases, and with the lowest that pyproject.toml declares: each in an environment of its own.
test-latest:
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install --quiet --upgrade pip
	.venv-latest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]"
	OMP_NUM_THREADS=1 .venv-latest/bin/pytest $(PYTEST_OPTIONS)

test-lowest: $(VENV)/pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) uv
	mkdir -p build
	$(BIN)/uv pip compile --quiet --upgrade --no-annotate --resolution lowest-direct pyproject.toml constraints/tools.in --extra dev \
	  --python-version $(PYTHON_VERSION) $(X86_64) -o build/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint build/lowest.txt pip
	.venv-lowest/bin/pip install --quiet --constraint build/lowest.txt --build-constraint constraints/build.txt -e ".[dev]"
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest $(PYTEST_OPTIONS)

# The CUDA decoder on the fake driver, with the lowest and the newest cuda-bindings of each major version that the extras allow.
CUDA_BINDINGS := 12.8.0 12.9.10 13.0.0 13.5.0
test-cuda-bindings: $(VENV)/dev
	for v in $(CUDA_BINDINGS); do \
	  there=build/cuda-bindings/$$v; \
	  $(BIN)/pip install --quiet --no-deps --upgrade --target $$there cuda-bindings==$$v || exit $$?; \
	  PYTHONPATH=$$there $(BIN)/python -c "import cuda.bindings as c; assert c.__version__ == '$$v', c.__version__" || exit $$?; \
	  PYTHONPATH=$$there OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/emulated/test_decoder.py tests/emulated/test_failures.py || exit $$?; \
	done

# The wheels, one a platform for every Python, and the source distribution: dist/. Any x86-64 machine builds all of them.
wheels: $(VENV)/pip
	$(PIP_INSTALL) auditwheel build macholib msgspec wheel ziglang
	$(BIN)/python runtimes/wheels.py --output dist

# The aarch64 wheel on a device: an emulated Debian root without a compiler. Uses sudo; installs debootstrap and qemu-user-static
# where they are missing, on Debian and Ubuntu.
test-device: $(VENV)/export
	$(PIP_INSTALL) auditwheel build macholib msgspec wheel ziglang
	$(BIN)/python runtimes/wheels.py --output build/device-wheel --platform manylinux_2_28_aarch64
	$(BIN)/cobra-edge export --target cpu --out build/device-bundle --force
	tests/device.sh build/device-wheel/*.whl build/device-bundle

# What the drift workflow measures: a build whose figures are the same on every CPU, within the budget's margin of 1 %.
drift-bundle: $(VENV)/export
	$(BIN)/cobra-edge export --target cpu --scheme w4a16-g128 --method rtn --vision-precision fp32 --out build/drift-bundle --force

drift-history: $(VENV)/export
	$(PIP_INSTALL) matplotlib
	$(BIN)/cobra-edge regress history drift.jsonl --out build/drift-history.svg

# What the release workflow runs, CONTRIBUTING.md tells when. TAG is read by the shell, from the environment: make would run the
# functions of its own in its text.
RELEASE := $(PYTHON) .github/release.py
check-tag:
	@$(RELEASE) check-tag "$$TAG"

github-release: check-tag
	mkdir -p build
	$(RELEASE) notes --links "$$GITHUB_SERVER_URL/$$GITHUB_REPOSITORY/blob/$$TAG" >build/release-notes.md
	gh release create "$$TAG" --verify-tag --title "$$TAG" --notes-file build/release-notes.md dist/*

# The x86-64 wheel in a Debian 11, whose Python 3.9 is too old for the package but not for the native library.
test-old-userland: $(VENV)/pip
	$(PIP_INSTALL) auditwheel build macholib msgspec wheel ziglang
	$(BIN)/python runtimes/wheels.py --output build/x86-wheel --platform manylinux_2_17_x86_64
	tests/old_userland.sh build/x86-wheel/*.whl

figures: $(VENV)/dev
	$(BIN)/python -m bench.figures

# cobra-mini's own drift limits; takes some minutes. Read what changed (git diff export/budgets) before you commit it.
budgets: $(VENV)/dev
	$(BIN)/python -m bench.budgets

clean:
	rm -rf $(VENV) .venv-latest .venv-lowest bundles build dist .mypy_cache .pytest_cache .ruff_cache

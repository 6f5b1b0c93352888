# One command each, from a fresh clone: every target makes its own virtual environment first, but for the gpu ones.
PYTHON ?= python3
# The version the figures were measured with. Any torch >= 2.10 serves: make test TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
# Empty: what pip chooses. A pair of versions that belong together: make test TORCH=torch==2.11.0 TRITON=triton==3.6.0
TRITON ?=
MODE := $(or $(FASTREFINE_BUILD),auto)
# An environment for each mode and each pair of versions: .venv-auto-torch-2.13.0
plain = $(subst ==,-,$(firstword $(1)))
VENV := .venv-$(MODE)-$(call plain,$(TORCH))$(if $(TRITON),-$(call plain,$(TRITON)))
BIN := $(VENV)/bin
export FASTREFINE_BUILD := $(MODE)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo docs test test-ray test-whole test-wheel kernels-check test-matrix lint
.PHONY: bench bench-compare bench-zoo gpu-check gpu-bench doctor clean

demo: $(VENV)/demo.stamp  ## the demo into the folder demo/
	$(BIN)/fastrefine demo --outdir demo

test: $(VENV)/test.stamp  ## the test suite
	$(BIN)/python -m pytest -m "not whole and not ray" -n auto --dist worksteal  # neighbouring tests share what was prepared

test-whole: $(VENV)/test.stamp  ## the quick run of every experiment of benchmarks/papers, docs/quickstart.md as it is read, the notebooks
	$(BIN)/python -m pytest -m whole -n auto --dist worksteal tests/papers tests/test_quickstart.py tests/test_notebooks.py

test-ray: $(VENV)/ray.stamp  ## a run on a local Ray cluster, a killed process included
	$(BIN)/python -m pytest -m ray tests/benchmarks/test_ray_cluster.py

# FROM=tar.gz installs the sdist instead. tests/ stands alone there, with a pyproject.toml of its own for pytest: with that of the
# checkout, pytest would import the checkout's package. tests/conftest.py makes sure of it.
FROM ?= whl
WHEEL := .venv-$(FROM)-$(call plain,$(TORCH))
test-wheel:  ## sdist and wheel into dist/; the wheel in a fresh environment, and there the tests that need only the package
	rm -rf dist $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check build $(TORCH)
	$(WHEEL)/bin/python -m build
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.$(FROM))[test]"
	mkdir $(WHEEL)/suite && cp -r tests pyproject.toml $(WHEEL)/suite
	cd $(WHEEL)/suite && ../bin/python -m pytest -m "not whole and not slow and not ray" -n auto --dist worksteal $(or $(ARGS),tests)

docs: $(VENV)/docs.stamp  ## the site into build/site; ends with an error at a broken link
	$(BIN)/python docs/site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # the theme's advertisement of its successor

kernels-check: $(VENV)/test.stamp  ## compile every kernel for sm_80 and sm_90; needs no GPU
	$(BIN)/python .ci/kernels_check.py 80 90

test-matrix:  ## make test with each pair of torch and triton that is supported, in environments of their own
	$(MAKE) test TORCH=torch==2.11.0 TRITON=triton==3.6.0
	$(MAKE) test TORCH=torch==2.13.0 TRITON=triton==3.8.0

lint: $(VENV)/lint.stamp  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test.stamp  ## the rows of a CPU, each printed as it comes, under five minutes, also as pytest-benchmark's JSON; options in ARGS
	$(BIN)/python -m benchmarks.zoo --seconds 0.2
	$(BIN)/python -m benchmarks run --device cpu $(ARGS)

bench-compare: $(VENV)/test.stamp  ## HEAD's seconds over those of BASE=REVISION, in turn; options in ARGS
	$(BIN)/python -m benchmarks compare $(or $(BASE),$(error BASE=REVISION is needed)) $(ARGS)

bench-zoo: $(VENV)/test.stamp  ## public checkouts in the folder ZOO against plain loops, on a CPU; options in ARGS
	$(BIN)/python -m benchmarks.zoo $(ZOO) $(ARGS)

# A machine with a GPU often has its own torch and no network: these use $(PYTHON) as it is and install nothing.
CHECKED = $(shell $(PYTHON) -m benchmarks.machine)
CUDA_TESTS = $(shell grep -lrE "mark\.cuda|needs_gpu" tests --include="test_*.py")
WORKERS = $(shell $(PYTHON) -c "import importlib.util, os; print(f'-n {min(8, os.cpu_count())}' * bool(importlib.util.find_spec('xdist')))")

gpu-check:  ## build, then the tests that need a GPU, and a report; options of pytest in ARGS
	-$(PYTHON) setup.py --quiet build_ext --inplace
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(PYTHON) -m pytest -m "cuda and not slow" $(WORKERS) -o faulthandler_timeout=60 \
		--junitxml=$(CHECKED)/check.xml $(CUDA_TESTS) $(ARGS)

gpu-bench:  ## the rows of a GPU, each printed as it comes; options in ARGS
	-$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks run --device cuda --profile $(ARGS)

doctor: $(VENV)/demo.stamp
	$(BIN)/fastrefine doctor

clean:
	rm -rf .venv-* build dist demo fastrefine/*.so *.egg-info

$(VENV)/demo.stamp: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --editable ".[test]" $(TRITON)
	touch $@

$(VENV)/ray.stamp: $(VENV)/test.stamp
	$(PIP) --editable ".[test,ray]" $(TRITON)
	touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp
	$(PIP) --editable ".[docs]"
	touch $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(PIP) --editable ".[test,lint]" $(TRITON)
	touch $@

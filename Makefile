# `make` lists the targets. They run in .venv, which each of them makes when it is missing or out of date.
PYTHON ?= python3
OPS := nearest_codebook masked_attention code_mixture group_norm_silu add_layer_norm maskgit_decode_step
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes of one thread each: most tests compute too little for a second thread to help.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup build quickstart test test-fast test-matrix sanitize lint format docs kernels gpu bench bench-tables \
	bench-documents wheels clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

# .venv is up to date when this file is newer than everything that an installation is made from. For the build, pip
# downloads setuptools and pybind11. Neither a GPU nor nvcc nor root is needed.
$(STAMP): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: $(STAMP)  ## make .venv and install titok with every extra that development needs

build:  ## compile what changed in csrc/ into titok/_C
	$(BIN)/python setup.py --quiet build_ext --inplace

quickstart: $(STAMP)  ## train a small TiTok and MaskGIT on real digits and generate; 2 to 4 minutes on two cores
	$(BIN)/titok quickstart

test: $(STAMP)  ## run every test
	$(PYTEST)

test-fast: $(STAMP)  ## run the tests that take about a second or less each
	$(PYTEST) -m 'not slow'

# It takes the Pythons on PATH or those of pyenv, and PyTorch from the package index.
#   ENVIRONMENTS='3.10-lowest 3.13-newest'   some of those that python tests/matrix.py --help lists; default: all
test-matrix: $(STAMP)  ## run the fast tests on Python 3.10 to 3.13, lowest and newest dependencies; downloads up to 9 GB
	$(BIN)/python tests/matrix.py $(ENVIRONMENTS)

# Options, e.g. make sanitize SANITIZE_OPTIONS='--seconds 120': see python tests/sanitize/run.py --help
sanitize: $(STAMP)  ## run the C++ ops under sanitizers; 20 minutes (SANITIZE_OPTIONS='--seconds 120' sets a budget)
	$(BIN)/python tests/sanitize/run.py $(SANITIZE_OPTIONS)

lint: $(STAMP)  ## check with ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Look at it with: python -m http.server -d site
docs: $(STAMP)  ## build the documentation into site/; a broken link or an undocumented public name is an error
	$(BIN)/python -m pytest -q tests/test_docs.py -k api
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The extra `triton` allows Triton 3.6.0 too. It lies in a folder of its own and is downloaded once.
SECOND_TRITON := build/triton-3.6.0
kernels: $(STAMP)  ## compile every Triton kernel for six GPU generations without a GPU, check it, write kernels/RESOURCES.md
	$(BIN)/python -m titok.kernels.aot --write
	test -d $(SECOND_TRITON) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(SECOND_TRITON) triton==$(SECOND_TRITON:build/triton-%=%)
	PYTHONPATH=$(SECOND_TRITON) $(BIN)/python -m titok.kernels.aot >/dev/null

# It takes the Python of PYTHON with its own torch and Triton, and makes no .venv: nothing is downloaded.
#   PART='2 3'            of the parts that python -m benchmarks.gpu --help lists; default: all
#   BUDGET=900            seconds for everything
#   DIFFUSERS=PATH        DiT's package where it is not installed: a wheel, or a folder with wheels or with the package
#   OUT=FOLDER            for results and output; default: runs/gpu
#   COMMIT=$$(git rev-parse HEAD)   what results name as the commit, where there is no git repository
#   DRY=1                 computes nothing: checks arguments and collects tests, also without a GPU
gpu:  ## with a GPU: build, GPU tests, benchmarks against DiT, sanitizers, tuning (PART=2 BUDGET=900 DIFFUSERS=PATH DRY=1)
	$(PYTHON) -m benchmarks.gpu $(if $(PART),--part $(PART)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--out $(OUT)) \
		$(if $(DIFFUSERS),--diffusers $(DIFFUSERS)) $(if $(COMMIT),--commit $(COMMIT)) $(if $(DRY),--dry)

bench: $(STAMP)  ## TiTok against DiT-XL/2 at 512 pixels, then every op against its peers; about 15 minutes
	$(BIN)/python -m benchmarks.speedup --limit 480
	for op in $(OPS); do $(BIN)/python -m benchmarks.bench_$$op --seconds 2 || exit 1; done

# Goes on where it stopped. Options, e.g. make bench-tables SESSION='--limit 1800 --only engine': see --help
bench-tables: $(STAMP)  ## measure every table of the documents on a quiet machine, row by row; 110 minutes on two cores
	$(BIN)/python -m benchmarks.session $(SESSION)

bench-documents: $(STAMP)  ## write docs/performance.md and its plots from benchmarks/results
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.report

# The wheel is of this Python and platform. It bundles no OpenMP runtime: PyTorch's is loaded first and has the same name.
wheels: $(STAMP)  ## build the source distribution and the manylinux wheel of this Python into dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	rm -rf build/wheels dist
	$(BIN)/python -c "import setuptools.build_meta as build; build.build_sdist('dist')"
	TITOK_BUILD=strict $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		-w build/wheels .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude libgomp.so.1 -w dist build/wheels/*.whl
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove what was built, except .venv and runs/
	rm -rf build dist site *.egg-info titok/_C*.so

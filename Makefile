# `make` lists the targets. Everything runs in .venv, which `make setup` makes from the project's own files.
PYTHON ?= python3
GPU_PYTHON ?= python3
OPS := nearest_codebook masked_attention code_mixture group_norm_silu add_layer_norm maskgit_decode_step
VENV := .venv
BIN := $(VENV)/bin
# build isolation asks PyPI for setuptools and pybind11; nothing here needs a GPU, nvcc or root
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup build quickstart test test-fast lint format kernels gpu bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: $(STAMP)  ## make .venv and install titok with every extra that development needs

build:  ## compile csrc/ again into titok/_C (incremental)
	$(BIN)/python setup.py --quiet build_ext --inplace

quickstart: $(STAMP)  ## train a small TiTok and a MaskGIT on real digits, generate; two to four minutes on two cores
	$(BIN)/titok quickstart

test: $(STAMP)  ## every test
	$(BIN)/python -m pytest -q

test-fast: $(STAMP)  ## the tests that take a second or less each
	$(BIN)/python -m pytest -q -m 'not slow'

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kernels: $(STAMP)  ## compile every Triton kernel for three GPU generations with no GPU, check it, write its table
	$(BIN)/python -m titok.kernels.aot --write

# A GPU machine has its own Python with its own torch, which is used as it is: nothing is downloaded.
# Options, e.g. make gpu GPU_OPTIONS='--minutes 20 --out results': see python -m benchmarks.gpu --help
gpu:  ## with a GPU: build, GPU tests, all benchmarks (GPU_PYTHON=python3 GPU_OPTIONS='--minutes 8.5 --out FOLDER')
	$(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)

bench: $(STAMP)  ## TiTok against DiT-XL/2 at 512 pixels, then every op against its peers; about 15 minutes
	$(BIN)/python -m benchmarks.speedup --limit 480
	for op in $(OPS); do $(BIN)/python -m benchmarks.bench_$$op --seconds 2 || exit 1; done

clean:  ## remove what was built (keeps .venv and runs/)
	rm -rf build dist *.egg-info titok/_C*.so

# make demo | setup | lint | audit | test | test-all | test-release | test-gpu | fuzz | kernels-test | tables | peers
# PYTHON=python3.12 chooses the interpreter of a new .venv

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --no-compile --constraint constraints.txt
# What the demo needs, and what everything needs that runs without a GPU
DEMO := cpu,export
SETUP := $(DEMO),train,calib,openvino,rtx,serve,schema,ray,dev

PEERS := build/peers
LLAMA_CPP := llama-cpp-python==0.3.36
LOCUST := locust==2.47.0
GENAI := onnxruntime-genai==0.18.0
PIP_AUDIT := pip-audit==2.10.1

.PHONY: demo setup lint audit test test-all test-release test-gpu fuzz kernels-test tables peers

demo: $(VENV)/.demo
	$(RUN) -m runtime.cli demo

# torch and torchvision come first, alone: no other requirement may choose another build of them
$(VENV)/.demo: pyproject.toml constraints.txt $(wildcard runtime/kernels/*/*.cpp runtime/kernels/*/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision
	$(PIP) --editable '.[$(DEMO)]'
	touch $@

setup: $(VENV)/.setup

$(VENV)/.setup: $(VENV)/.demo
	$(PIP) --editable '.[$(SETUP)]'
	touch $@

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --cache-dir build/import-linter
	$(RUN) -m pyright --pythonpath $(RUN)
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard runtime/kernels/*/*.h runtime/kernels/*/*.cpp)
	$(RUN) -m benchmarks.tables --check

# Known vulnerabilities of what `make setup` installs, by PyPI's advisories: it needs the network
audit: build/audit/.installed
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

build/audit/.installed: Makefile
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(PIP_AUDIT)
	touch $@

test test-all test-release: setup
	$(RUN) -m tests.run $@

# On the GPU's machine, in the environment at hand: `make setup` installs no package for GPUs
test-gpu:
	@command -v nvidia-smi > /dev/null || { echo 'make test-gpu needs a GPU: there is no nvidia-smi here' >&2; exit 2; }
	$(PYTHON) tests/gpu/run.py

# Longer than `make test-all` does, e.g. make fuzz SECONDS=3600; what it finds goes to build/fuzz
SECONDS := 600
fuzz: setup
	$(RUN) -m tests.fuzz all --seconds $(SECONDS)

# The kernels' C++ tests, with sanitizers. ORT_INCLUDE: a folder with onnxruntime_c_api.h, to compare ort_abi.h with it
SANITIZED := $(CXX) -std=c++17 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=undefined
kernels-test: setup
	mkdir -p build/kernels
	for test in kernels encoder attention; do $(SANITIZED) -Iruntime/kernels/include -o build/kernels/test_$$test \
	    runtime/kernels/tests/test_$$test.cpp $(filter-out %_op.cpp,$(wildcard runtime/kernels/src/*.cpp)) || exit; done
	$(SANITIZED) -Iruntime/kernels/include $(ORT_INCLUDE:%=-isystem %) -o build/kernels/test_ort_abi \
	    runtime/kernels/tests/test_ort_abi.cpp -ldl
	build/kernels/test_kernels
	build/kernels/test_encoder
	build/kernels/test_attention
	build/kernels/test_ort_abi $$($(RUN) -c 'import onnxruntime; print(onnxruntime.__path__[0])')/capi/libonnxruntime.so*

tables: setup
	$(RUN) -m benchmarks.tables

# What benchmarks compare with and cannot share an environment. llama.cpp is compiled, for the processor at hand: minutes
peers: setup $(PEERS)/llama.cpp/.installed $(PEERS)/locust/.installed $(PEERS)/optimum/.installed \
    $(PEERS)/ort-genai/.installed

$(PEERS)/llama.cpp/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt $(LLAMA_CPP) nncf openvino pillow
	touch $@

$(PEERS)/locust/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(LOCUST) $$(grep '^openai==' constraints.txt)
	touch $@

$(PEERS)/ort-genai/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt $(GENAI) onnx onnx-ir safetensors torch transformers
	touch $@

# optimum-onnx wants transformers < 4.58 and what goes with it
$(PEERS)/optimum/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable '.[optimum]'
	touch $@

# make setup | demo | test | lint | tables | peers        (PYTHON=python3.12 chooses the interpreter of a new .venv)

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Everything a machine without a GPU needs. torch and torchvision come first, alone: no other requirement may choose
# another build of them.
EXTRAS := cpu,export,train,calib,openvino,rtx,serve,benchmarks,dev

# The demo model as far as it is trained
READER := build/carried/reader_fifth

PEERS := build/peers
LLAMA_CPP := llama-cpp-python==0.3.36
LOCUST := locust==2.47.0

.PHONY: setup demo test test-gpu lint tables peers

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard runtime/kernels/*.cpp runtime/kernels/*.h)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and \
	    f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.12 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch torchvision
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: setup
	test -d $(READER) || $(RUN) -m train.model.demo --unpack train/runs/convllava-smol/reader_fifth.safetensors $(READER)
	$(RUN) -m export.encoder --checkpoint $(READER) --res 1536
	$(RUN) -m export.bundle --checkpoint $(READER) --res 1536 --out build/bundle/pages
	$(RUN) runtime/infer.py --bundle build/bundle/pages --image assets/board.png --prompt 'What is written for "Number"?'
	$(RUN) runtime/infer.py --bundle build/bundle/pages --res 320 --image assets/figures.png \
	    --prompt 'Where is the battery? Answer with a box.' --draw build/figures.png

# Each package in a process of its own: PyTorch, TensorRT, OpenVINO and their threads all in one have crashed
test: setup
	set -e; for group in tests/unit tests/integration/*/; do $(RUN) -m pytest $$group; done

test-gpu: setup
	$(RUN) tests/gpu/run.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m benchmarks.tables --check

tables: setup
	$(RUN) -m benchmarks.tables

# What benchmarks compare with and cannot share an environment. llama.cpp is compiled, for the processor at hand: minutes
peers: setup $(PEERS)/llama.cpp/.installed $(PEERS)/locust/.installed

$(PEERS)/llama.cpp/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt $(LLAMA_CPP) openvino pillow
	touch $@

$(PEERS)/locust/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(LOCUST)
	touch $@

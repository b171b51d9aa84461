# make setup | demo | test | lint | tables        (PYTHON=python3.12 chooses the interpreter of a new .venv)

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Everything a machine without a GPU needs. torch and torchvision come first, alone: no other requirement may choose
# another build of them.
EXTRAS := cpu,export,train,calib,openvino,rtx,serve,benchmarks,dev

.PHONY: setup demo test lint tables

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and \
	    f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.12 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch torchvision
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(RUN) -m export.encoder --res 1536
	$(RUN) -m export.bundle
	$(RUN) runtime/infer.py --image assets/coffee.jpg --prompt 'Write one sentence about coffee.' --max-new-tokens 64

# Each room in a process of its own: PyTorch, TensorRT, OpenVINO and their threads all in one have crashed
test: setup
	set -e; for room in tests/[a-z]*/; do $(RUN) -m pytest $$room; done

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m benchmarks.tables --check

tables: setup
	$(RUN) -m benchmarks.tables

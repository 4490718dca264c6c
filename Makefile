# `make demo` and `make test` set up all they need on a Linux machine with Python >= 3.11; `make help` lists the rest.
#
# On the command line: PYTHON=... (which Python makes .venv), ARGS=... (handed to the demo or to pytest), JOBS=... (pytest
# processes). pip's own variables work as ever: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets torch without
# the CUDA libraries, which on a machine without a GPU are 3 GB for nothing.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV := .venv
LAVA_VENV := .venv-lava
READERS_VENV := .venv-readers
NEUROBENCH_VENV := .venv-neurobench
ENERGY_VENV := .venv-energy
PY := $(VENV)/bin/python
ARGS ?=
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PIP_INSTALL := -m pip install --disable-pip-version-check
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(JOBS) --dist worksteal

# A stamp is named after what it vouches for: the pins, the dependencies, the folder. Same name: nothing to install.
key = $(shell { cat $(1); pwd; } | cksum | tr -d ' ')
INSTALLED := $(VENV)/.spikegate-$(call key,pyproject.toml constraints.txt)
INSTALLED_DEV := $(INSTALLED)-dev
INSTALLED_LAVA := $(LAVA_VENV)/.spikegate-$(call key,constraints-lava.txt)
INSTALLED_READERS := $(READERS_VENV)/.spikegate-$(call key,constraints-readers.txt)
INSTALLED_NEUROBENCH := $(NEUROBENCH_VENV)/.spikegate-$(call key,constraints-neurobench.txt)
INSTALLED_ENERGY := $(ENERGY_VENV)/.spikegate-$(call key,constraints-energy.txt)

.PHONY: help demo test soak coverage lint docs lava lava-if-possible readers neurobench energy-check install clean distclean

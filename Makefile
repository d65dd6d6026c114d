# Needs Python >= 3.11 (< 3.15) and make; everything else is installed into .venv from requirements.lock.
#
#   make run    the day of 2026-02-15 through the whole graph, checked figure by figure; exit 0 if all hold
#   make up     plays that day unless it was played before, then the Dagster UI with its daemon; Ctrl-C stops them
#   make test   lint and all tests; lint audits the dependencies too, and says so where nobody answers about vulnerabilities
#   make faults every fault test, then a soak of 210 random faults under eight writers; make faults QUICK=1 a short one
#   make audit  known vulnerabilities of the locked dependencies (asks pypi.org, and fails without an answer)
#   make docs   a page per room from the code's own docstrings, under build/docs
#   make bench  the benchmarks, as ratios in one run, hours; every engine's rows compared at 10 million, Spark's where there
#               is Java; make bench QUICK=1 takes minutes, without Spark
#   make clean  stops the embedded database of .flywheel and removes what make and the pipeline made here

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
# The first Python of a supported version; or `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; \
	then echo $$p; break; fi; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: run up test lint faults audit docs bench clean install scale lock
.DEFAULT_GOAL := run

run: install
	$(BIN)/flywheel simulate replay-2026-02-15

up: install
	$(BIN)/flywheel simulate replay-2026-02-15 --unless-played
	$(BIN)/flywheel up

test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: install scale
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py

faults: install scale
	$(BIN)/python -m pytest -m "faults or long"
	$(BIN)/python tests/faults/soak.py $(if $(QUICK),--quick)

audit: install
	$(BIN)/python .ci/audit.py --known

docs: install
	$(BIN)/python docs/rooms.py

bench: install scale
	$(BIN)/python benchmarks/run.py $(if $(QUICK),--quick)

# -- installation: each step leaves a stamp, so that a warm run does nothing here ---------------------

install: $(VENV)/installed.stamp

# A virtual environment whose Python is gone (moved, upgraded) is made anew.
$(shell [ ! -e $(VENV)/created.stamp ] || $(BIN)/python -c '' 2>/dev/null || rm -f $(VENV)/*.stamp)

$(VENV)/created.stamp:
	@[ -n "$(PYTHON)" ] || { echo "make: no Python from 3.11 to 3.14 found; say make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/requirements.stamp: requirements.lock $(VENV)/created.stamp
	$(PIP) install --quiet --no-deps --require-hashes -r requirements.lock
	@touch $@

$(VENV)/installed.stamp: pyproject.toml $(VENV)/requirements.stamp
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# What tests and `make bench` need beyond one machine's own: Spark, Celery, Kubernetes. Users of those say `make scale`.
scale: $(VENV)/scale.stamp

$(VENV)/scale.stamp: requirements-scale.lock $(VENV)/installed.stamp
	$(PIP) install --quiet --no-deps --require-hashes -r requirements-scale.lock
	@touch $@

# Resolves pyproject.toml anew: one lock for every platform and Python, with hashes and without an index.
# requirements.lock is what one machine needs, requirements-scale.lock adds Spark, Celery and Kubernetes, and
# deploy/requirements.lock is what the image holds: no tools of developers; deploy/build.lock is what builds it.
# `make lock UPGRADE=` keeps the pins that still fit.
UPGRADE ?= --upgrade
LOCK := --universal --python-version 3.11 \
	--generate-hashes --no-strip-extras --no-emit-index-url --no-header --no-annotate --quiet
COMPILE := $(BIN)/uv pip compile pyproject.toml $(LOCK)
lock: install
	$(COMPILE) $(UPGRADE) --extra dev --extra duckdb --extra s3 -o requirements.lock
	$(COMPILE) $(UPGRADE) --all-extras --constraint requirements.lock -o requirements-scale.lock
	$(COMPILE) $(UPGRADE) --extra duckdb --extra s3 --extra celery --extra k8s --constraint requirements-scale.lock -o deploy/requirements.lock
	grep -m 1 '^hatchling==' requirements.lock | cut -d ' ' -f 1 \
		| $(BIN)/uv pip compile - $(LOCK) --constraint requirements.lock -o deploy/build.lock

clean:
	@if [ -d .flywheel/postgres ] && [ -x $(BIN)/python ]; then \
		$(BIN)/python -c 'from pathlib import Path; from flywheel_pipeline.database.embedded import EmbeddedServer; EmbeddedServer(Path(".flywheel")).remove()'; \
	fi
	rm -rf .flywheel $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

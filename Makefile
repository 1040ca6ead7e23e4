# `make demo` and `make test` need nothing but a Debian 12 machine: `.venv/.ready` installs what is missing.

VENV   := .venv
PYTHON := $(VENV)/bin/python
LOCK   := $(VENV)/bin/pip-compile --quiet --no-header --generate-hashes --allow-unsafe --strip-extras \
          --no-emit-index-url --no-emit-find-links

.DEFAULT_GOAL := help
.PHONY: help install packages demo bench test test-unit test-mount torture check format format-check lint type imports \
        lock lock-check clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: packages $(VENV)/.ready  ## install Debian packages (as root or with sudo) and .venv

packages:
	@bash scripts/install.sh packages

$(VENV)/.ready: requirements-dev.txt pyproject.toml scripts/install.sh | packages
	bash scripts/install.sh venv $(VENV)
	@touch $@

demo: install  ## the main job on real input
	$(PYTHON) -m scripts.demo $(ARGS)

bench: install  ## cryptfs, gocryptfs and the plain directory side by side; ARGS='--quick' for a short run
	$(PYTHON) -m scripts.bench $(ARGS)

# Each worker has directories, agents and mounts of its own; ARGS='-n 0' runs everything in one process. Twice as many
# as processors: half of the time a test that mounts waits for a disk, a time-out or a program that ends.
WORKERS := $(shell echo $$((2 * $$(nproc))))
# Tests start some thousand Python programs: what each of them imports is compiled once, whatever the environment says.
PYTEST := PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

test: install  ## every test
	$(PYTEST) -m 'not torture' $(ARGS)

test-unit: install  ## tests that need no mount
	$(PYTEST) -m 'not mount and not torture' $(ARGS)

test-mount: install  ## tests that need /dev/fuse
	$(PYTEST) -m 'mount and not torture' $(ARGS)

torture: install  ## long random runs; CRYPTFS_TORTURE_S=7200 is the time for crash states
	@bash scripts/install.sh torture
	$(PYTHON) -m pytest -s -m torture $(ARGS)

check: format-check lint type imports lock-check  ## everything that reads the code without running it

format: install  ## lay the code out
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix-only --quiet .

format-check: install
	$(PYTHON) -m ruff format --check .

lint: install  ## ruff
	$(PYTHON) -m ruff check .

type: install  ## mypy --strict
	$(PYTHON) -m mypy

imports: install  ## the import contract (design: who may import whom)
	$(VENV)/bin/lint-imports --no-cache

lock: install  ## pin requirements again, to the newest versions allowed
	$(LOCK) --upgrade --output-file requirements.txt pyproject.toml
	$(LOCK) --upgrade --output-file requirements-dev.txt requirements-dev.in

lock-check:
	@if grep -nE '://|--(extra-)?index-url|--find-links|--trusted-host|(^|[ "])/[a-z]+/' requirements*; then \
	    echo 'error: requirements files name no registry and no path'; exit 1; fi

clean:  ## remove everything made here, .venv too
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

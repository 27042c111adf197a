# Everything a checkout can do; `make help` lists it. No target needs another to
# have been run: the environment in .venv is made and renewed on the way.

VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: only errors.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test test-all lint coverage bench wheel clean $(VENV)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

serve: $(VENV)/installed  ## serve ./var/Data.fs on 127.0.0.1:8100, in the foreground
	@mkdir -p var
	@echo 'once it is ready, connect with:'
	@echo '    $(BIN)/python'
	@echo '    >>> from zeolith.client import connection'
	@echo '    >>> root = connection("127.0.0.1:8100").root()'
	@exec $(BIN)/zeolith serve --address 127.0.0.1:8100 --path var/Data.fs

# Two, for much of a test is waiting; the tests of a file stay together. With 0 they
# run in pytest's own process, as those of `make coverage` do.
WORKERS := 2

test: $(VENV)/installed-dev  ## run the tests, without the slow ones
	$(BIN)/pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile

test-all: $(VENV)/installed-fuzz  ## run every test
	$(BIN)/pytest

lint: $(VENV)/installed-dev  ## check the format, the lint rules and the types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

coverage: $(VENV)/installed-dev  ## run the tests and report what they do not reach
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(VENV)/installed-bench  ## measure zeolith against ZEO and others
	$(BIN)/python -m tests.bench.compare $(ARGS)

wheel: $(VENV)/installed-dev  ## build the wheel into dist/
	rm -rf build
	$(BIN)/python -m build --wheel --outdir dist .

clean:  ## remove everything that make made, but no data
	rm -rf $(VENV) build dist zeolith.egg-info
	rm -f client/*.so server/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find $(wildcard client protocol server storage tests) \
		-name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): $(VENV)/installed-dev  ## make the environment with everything to develop

# The first of these that is new enough makes the environment.
PYTHONS := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11

$(BIN)/python:
	@for python in $(PYTHONS); do \
		if command -v $$python >/dev/null && $$python -c \
			'import sys; sys.exit(sys.version_info < (3, 11))'; \
		then \
			echo "making $(VENV) with $$($$python --version)"; \
			$$python -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
			exit 0; \
		fi; \
	done; \
	echo "zeolith needs Python 3.11 or newer; tried: $(strip $(PYTHONS))" >&2; exit 1

COMPILED := $(wildcard client/*.c server/*.c)

$(VENV)/installed: pyproject.toml $(COMPILED) | $(BIN)/python
	$(PIP) install --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(COMPILED) | $(BIN)/python
	$(PIP) install --editable ".[dev]"
	@touch $(VENV)/installed $@

# Not for every system, nor every Python; without it, its tests are skipped.
$(VENV)/installed-fuzz: $(VENV)/installed-dev
	@$(PIP) install --editable ".[fuzz]" && touch $@ \
		|| echo 'atheris cannot be installed; nothing is fuzzed with it' >&2

# What only a comparison needs. Without it, there is one rival less.
$(VENV)/installed-bench: $(VENV)/installed-dev
	@$(PIP) install --editable ".[bench]" && touch $@ \
		|| echo 'RelStorage cannot be installed; make bench goes on without it' >&2

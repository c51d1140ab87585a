# `make demo` and `make test` set up what they need: a virtual environment in .venv, once.
PYTHON ?= python3
VENV ?= .venv
# Tests run on one thread each, so several side by side. Files stay whole: their fixtures are made once.
JOBS ?= logical
STAMP := $(VENV)/.installed
export VENV

.PHONY: help setup demo docs test check clean

help:
	@echo "make demo    quantize the shipped model, compare, write demo/report.html"
	@echo "make docs    the documentation as a site in build/site"
	@echo "make test    static checks, then all tests"
	@echo "make check   static checks only"
	@echo "make setup   the virtual environment only"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e .[dev]
	touch $@

demo: $(STAMP)
	$(VENV)/bin/stepquant demo -o demo

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

check: $(STAMP)
	scripts/check

test: check
	$(VENV)/bin/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

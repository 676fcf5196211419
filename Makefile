# `make` alone prints what there is to make. Everything runs in .venv, which is made first where it is missing.
# The default build of torch brings CUDA libraries along. To install a CPU build instead, let pip see one, for instance
# with `make PIP_FIND_LINKS=/folder/with/wheels`, or PIP_EXTRA_INDEX_URL (pip's own settings, all of them hold here).

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast lint docs clean

help: ## print these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(INSTALLED) ## install, then run configs/quickstart.yaml
	$(BIN)/fedpers run configs/quickstart.yaml

# Two processes with a thread each: the libraries' own threads would wait for each other. Each takes half of the files as
# they stand, so that what tests of a file share is made once, and whoever is done takes over from the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(INSTALLED) ## install, then run all tests, two at a time
	$(PYTEST)

test-fast: $(INSTALLED) ## install, then run the tests that need no real model and no network
	$(PYTEST) -m "not slow"

lint: $(INSTALLED) ## install, then check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED) ## install, then make the documentation site, site/index.html; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d site/.trees . site

clean: ## remove .venv, site and the caches of tools; runs and fetched assets stay
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints go in by -c, not by PIP_CONSTRAINT: that variable would also bind the isolated build, which needs
# nothing but hatchling. The mark is made last, so an interrupted install is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing fedpers and its dependencies into .venv (a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

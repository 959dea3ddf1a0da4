# The checks that a change has to pass, without installing anything: .ci/run does the same in a fresh environment.
SHELL := bash
.PHONY: quick check fuzz soak matrix matrix-quarter lowest lowest-versions gpu style types imports test site

quick: style types imports # after each edit
	python -m pytest -q -m "not matrix and not slow"

check: style types imports test

matrix: # every layout with every architecture, and what else takes minutes
	python -m pytest -q -m matrix

QUARTER ?= $(shell echo $$((0x$$(git rev-parse --short=8 HEAD) % 4)))
matrix-quarter: # that of the commit, unless QUARTER says which
	@echo "quarter $(QUARTER) of the matrix; to repeat it: make matrix-quarter QUARTER=$(QUARTER)"
	python -m pytest -v -m matrix --quarter $(QUARTER)

LOWEST ?= .venv/lowest
lowest: # the default suite with the lowest versions that pyproject.toml allows
	python3 -m venv $(LOWEST)
	$(MAKE) --silent lowest-versions > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt --editable '.[dev]'
	PATH="$(abspath $(LOWEST))/bin:$$PATH" python -m pytest -q

lowest-versions:
	sed -nE 's/^    "([a-z_]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml

gpu: # what a GPU alone can show
	python -m pytest -q -n0 -m gpu

SITE = build/site
site: # the documentation as build/site/html/index.html; pip install '.[docs]'
	rm -rf $(SITE) && mkdir -p $(SITE)/source
	cp -r docs CHANGELOG.md CONTRIBUTING.md SECURITY.md $(SITE)/source && cp README.md $(SITE)/source/index.md
	cd $(SITE)/source/docs && mv site/*.toml site/*.py ../.. && mv site/* . && rmdir site
	cd $(SITE) && PYTHONPATH=.:$(CURDIR) zensical build --strict

style:
	ruff check .
	ruff format --check .

types:
	mypy

imports:
	lint-imports

N ?= 10000
fuzz: # N mutations of every kind of file that is read
	python -m tests.faults.fuzzing $(N)

KILLS ?= 100
soak: # runs that are killed at random moments, KILLS times in all
	python -m tests.faults.soak $(KILLS)

test:
	python -m pytest -q

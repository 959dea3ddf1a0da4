# The checks that a change has to pass, without installing anything: .ci/run does the same in a fresh environment.
.PHONY: check style types test
check: style types test

style:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	python -m pytest -q

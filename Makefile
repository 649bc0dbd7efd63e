# Two commands do everything: `make portrait` and `make test`. Each sets itself up in .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: portrait test lint clean

portrait: .venv/.runs
	$(BIN)/idgen generate examples/ada/1.png "a photo of a person, smiling, wearing a red shirt, blue background" \
		--seed 7 --out portrait.png

test: .venv/.tests
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.runs: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/.tests: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[all,dev]"
	touch $@ .venv/.runs

clean:
	rm -rf .venv build dist *.egg-info

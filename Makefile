# Everything runs in .venv, made on first use from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test checks rehearse clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(READY)  ## train on the demo images: a few minutes on two CPU cores
	$(BIN)/python -m massl_ray.train

test: $(READY)  ## every test
	$(BIN)/python -m pytest

rehearse: $(READY)  ## an elastic job on Ray's autoscaler, with machines that are processes of this computer: 6 minutes
	$(BIN)/python -m massl_ray.benches.rehearse

checks: $(READY)  ## the gates: style, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist *.egg-info

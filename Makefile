# `make demo` and `make test` each work alone on a fresh machine with Python 3.10-3.13 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types parity train-minis clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev,transformers,onnx,recipes,teachers]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python assets/roundtrip.py

test: $(STAMP) lint types
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/basedpyright --level error

# The whole reference fixtures (not shipped): make parity DIR=/path/to/parity
parity: $(STAMP)
	ANYTOK_PARITY=$(DIR) $(BIN)/python -m pytest -m parity

train-minis: $(STAMP)
	$(BIN)/python assets/recipes/train_minis.py

clean:
	rm -rf $(VENV) build dist *.egg-info

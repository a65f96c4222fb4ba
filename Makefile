# Two commands from a fresh checkout: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := demo
DEMO_QUERY := stages/sources/sample_images/t-shirt-blue.jpg

.PHONY: demo test test-slow check format bench clean

demo: $(VENV)/.build
	rm -rf $(DEMO)
	$(BIN)/arrag-db build --source sample --db $(DEMO)/db
	$(BIN)/arrag-db query --db $(DEMO)/db --image $(DEMO_QUERY) --exclude-self --row 12 --col 11 -k 5
	$(BIN)/arrag-db query --db $(DEMO)/db --image $(DEMO_QUERY) --exclude-self --no-table --sheet $(DEMO)/sheet.png
	@echo
	@echo "Open $(DEMO)/sheet.png: what came next in other pictures, where the neighbourhood looked alike."
	@echo
	@echo "Next, with your own pictures:"
	@echo "  $(BIN)/arrag-db build --source folder --input PICTURES --db mydb"
	@echo "  $(BIN)/arrag-db query --db mydb --image PICTURE.jpg --exclude-self --sheet sheet.png"
	@echo "  $(BIN)/arrag-db info --db mydb"

test: check
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.build
	$(BIN)/python benchmarks/bench_extract_write.py
	$(BIN)/python benchmarks/bench_encode.py
	$(BIN)/python benchmarks/bench_scale.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[build]" -c constraints.txt
	@touch $@

$(VENV)/.test: $(VENV)/.build
	$(PIP) -e ".[build,test,dev]" -c constraints.txt
	@touch $@

clean:
	rm -rf $(DEMO) $(VENV)

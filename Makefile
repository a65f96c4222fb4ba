# Two commands from a fresh checkout: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
# autofaiss needs numpy below 2, so what trains with it has an environment of its own.
IVFPQ := .venv-ivfpq
DEMO := demo
DEMO_QUERY := stages/sources/sample_images/t-shirt-blue.jpg

.PHONY: demo test test-slow test-ivfpq soak check format bench clean

demo: $(VENV)/.build
	rm -rf $(DEMO)
	$(BIN)/arrag-db build --source sample --db $(DEMO)/db
	$(BIN)/arrag-db query --db $(DEMO)/db --image $(DEMO_QUERY) --exclude-self --row 12 --col 11 -k 5
	$(BIN)/arrag-db query --db $(DEMO)/db --image $(DEMO_QUERY) --exclude-self --no-table --sheet $(DEMO)/sheet.png
	$(BIN)/arrag-db trainset --db $(DEMO)/db
	$(BIN)/arrag train --model sample --data $(DEMO)/db/trainset --out $(DEMO)/adapter \
	    --steps 6 --global-batch 8 --lora-rank 16 --lora-alpha 32
	$(BIN)/arrag generate --db $(DEMO)/db --model sample --prompt "a photo of a t-shirt" --mode compare \
	    --adapter $(DEMO)/adapter/adapter.safetensors -n 2 --out $(DEMO)/generated.png \
	    --trace $(DEMO)/trace.json --trace-sheet $(DEMO)/trace.png
	@echo
	@echo "Open $(DEMO)/sheet.png: what came next in other pictures, where the neighbourhood looked alike;"
	@echo "     $(DEMO)/generated.png: the same seeds drawn plain, with DAiD and with FAiD;"
	@echo "     $(DEMO)/trace.png: which pictures the patches came from."
	@echo
	@echo "Next, with your own pictures:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  arrag-db build --source folder --input PICTURES --db mydb --hold-out 0.1"
	@echo "  arrag-db query --db mydb --image PICTURE.jpg --exclude-self --sheet sheet.png"
	@echo "  arrag generate --db mydb --model sample --prompt 'a photo of a hat' --out out.png"

# Two processes of tests: all that need the Ray session in one, the rest in the other, then by file.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not gpu"

test-ivfpq: $(IVFPQ)/.test
	$(IVFPQ)/bin/python -m pytest -m "ivfpq and not gpu"

soak: $(VENV)/.test
	$(BIN)/python -m pytest -m soak tests/pipeline/building/test_soak.py

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.build $(IVFPQ)/.test
	$(BIN)/python benchmarks/bench_extract_write.py
	$(BIN)/python benchmarks/bench_encode.py
	$(BIN)/python benchmarks/bench_scale.py
	$(IVFPQ)/bin/python benchmarks/index.py

$(BIN)/python $(IVFPQ)/bin/python:
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.build: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) -e ".[build,train]" -c constraints.txt
	@touch $@

$(VENV)/.test: $(VENV)/.build
	$(BIN)/python $(INSTALL) -e ".[build,train,test,dev]" -c constraints.txt
	$(BIN)/python -m pip check
	@touch $@

$(IVFPQ)/.test: pyproject.toml constraints-ivfpq.txt | $(IVFPQ)/bin/python
	$(IVFPQ)/bin/python $(INSTALL) -e ".[build,ivfpq,test]" -c constraints-ivfpq.txt
	$(IVFPQ)/bin/python -m pip check
	@touch $@

clean:
	rm -rf $(DEMO) $(VENV) $(IVFPQ)

# Each target is one line over the `aisle` command; `make demo` and `make test` set up what they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
AISLE := $(BIN)/aisle
CHECKPOINT ?= work/checkpoint
MODEL ?= $(CHECKPOINT)
URL ?= localhost:8001

.PHONY: demo test lint train evaluate engine compare serve classify loadtest bench drift clean

demo: .venv/ready ## the whole way on the synthetic sample, nothing left running
	$(AISLE) demo

test: lint ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

train: .venv/ready ## DATA=FILE [CHECKPOINT=DIR]
	$(AISLE) train --data $(DATA) -o $(CHECKPOINT)

evaluate: .venv/ready ## DATA=FILE [CHECKPOINT=DIR]
	$(AISLE) evaluate $(CHECKPOINT) $(DATA)

engine: .venv/ready ## [MODEL=DIR] [PRECISION=int8] [TARGET=openvino]
	$(AISLE) build $(MODEL) $(if $(PRECISION),--precision $(PRECISION)) $(if $(TARGET),--target $(TARGET))

compare: .venv/ready ## [MODEL=DIR]: every engine of it, build/report.html
	$(AISLE) compare $(MODEL)

serve: .venv/ready
	$(AISLE) serve

classify: .venv/ready ## FILE=FILE OUT=FILE [URL=HOST:PORT]
	$(AISLE) classify $(FILE) -o $(OUT) --url $(URL)

loadtest: .venv/ready ## [URL=HOST:PORT] DATA=FILE [OPTIONS="--zipf 1 --workers 2 --web"]
	$(AISLE) loadtest $(DATA) --url $(URL) $(OPTIONS)

bench: .venv/ready ## [DATA=FILE] [MODEL=DIR] [OPTIONS=--tune]: side by side with others, loadtest/report/bench.html
	$(AISLE) bench $(if $(DATA),--data $(DATA)) $(if $(filter command line,$(origin MODEL)),--model $(MODEL)) $(OPTIONS)

drift: .venv/ready ## LOG=FILE [CHECKPOINT=DIR]: whether to retrain
	$(AISLE) drift $(CHECKPOINT) $(LOG)

clean:
	rm -rf work model_repository/*/[0-9]*

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --progress-bar=on --editable '.[dev]'
	deploy/libpython.sh $(BIN)/python
	touch $@

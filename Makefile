# Each target runs one `aisle` command. `make demo` and `make test` first install what they need.
PYTHON ?= $(shell for each in .venv/bin/python python3.11 python3.12 python3; do $$each -c '' 2>/dev/null && echo $$each && break; done)
TORCH_INDEX ?= # the package index for PyTorch
LIBPYTHON ?= # "install": install a missing libpython with apt-get
ENVIRONMENT = $(PYTHON) deploy/server/environment.py
ENVIRONMENT_OPTIONS = $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(if $(filter install,$(LIBPYTHON)),--install-libpython)
BIN := .venv/bin
AISLE := $(BIN)/aisle
# Three workers for two cores, because many tests wait for servers.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist worksteal
CHECKPOINT ?= work/checkpoint
URL ?= localhost:8001

.PHONY: python demo test test-all lint docs picture pictures train evaluate engine compare serve classify loadtest bench drift clean clean-all

python: # first check whether this Python is suitable
	@$(ENVIRONMENT) demo --check

demo: python .venv/demo ## [ROWS=16000]: the whole pipeline on the synthetic sample; leaves nothing running
	$(AISLE) demo $(if $(ROWS),--rows $(ROWS))

test: lint ## the tests that take less than some fifteen seconds each
	$(PYTEST) -m "not long"

test-all: lint .venv-learn/ready ## the whole test suite, with the tutorials, the demo and the longest trainings; CI runs it
	$(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: .venv/ready ## the manual as a site, docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --builder html docs docs/_build/html

picture: .venv/ready ## make the README's picture from a new run of the demo
	$(AISLE) demo --json | $(BIN)/python docs/picture.py docs/_static/demo.svg

pictures: .venv/ready demo ## make the manual's pictures of the desk; needs chromium and a Chinese font
	$(BIN)/python docs/desk_pictures.py docs/_static/desk

train: .venv/ready ## DATA=FILE [CHECKPOINT=DIR] [OPTIONS=--overwrite]
	$(AISLE) train $(DATA) -o $(CHECKPOINT) $(OPTIONS)

evaluate: .venv/ready ## DATA=FILE [CHECKPOINT=DIR]
	$(AISLE) evaluate $(CHECKPOINT) $(DATA)

engine: .venv/ready ## [CHECKPOINT=DIR] [PRECISION=int8] [TARGET=openvino]
	$(AISLE) build $(CHECKPOINT) $(if $(PRECISION),--precision $(PRECISION)) $(if $(TARGET),--target $(TARGET))

compare: .venv/ready ## [CHECKPOINT=DIR]: compare all its engines, in build/report.html
	$(AISLE) compare $(CHECKPOINT)

serve: .venv/ready
	$(AISLE) serve

classify: .venv/ready ## FILE=FILE OUT=FILE [URL=HOST:PORT]
	$(AISLE) classify $(FILE) -o $(OUT) --url $(URL)

loadtest: .venv/ready ## [URL=HOST:PORT] DATA=FILE [OPTIONS="--zipf 1 --workers 2 --web"]
	$(AISLE) loadtest $(DATA) --url $(URL) $(OPTIONS)

bench: .venv/ready ## [DATA=FILE] [CHECKPOINT=DIR] [OPTIONS=--tune]: compare with other servers, in loadtest/report/bench.html
	$(AISLE) bench $(if $(DATA),--texts $(DATA)) $(if $(filter command line,$(origin CHECKPOINT)),--checkpoint $(CHECKPOINT)) $(OPTIONS)

drift: .venv/ready ## LOG=FILE [CHECKPOINT=DIR]: check whether to retrain
	$(AISLE) drift $(CHECKPOINT) $(LOG)

clean: ## remove files that are quick to make again; keep checkpoints and built versions
	rm -rf work/sample* work/.sample* work/triton.log work/bench work/peers
	rm -rf build/report.html build/report.json loadtest/report docs/_build
	@echo "kept: work/checkpoint and the versions in model_repository; make clean-all removes these too"

clean-all: clean ## remove everything that was made; asks first
	@printf "Delete work/ with its checkpoints and all built versions? Type yes: "; read answer && [ "$$answer" = yes ]
	rm -rf work model_repository/*/[0-9]*

# Packages for the demo, and for the tests as well; both show what they download.
.venv/demo: pyproject.toml
	$(ENVIRONMENT) demo $(ENVIRONMENT_OPTIONS)
	touch $@

.venv/ready: pyproject.toml
	$(ENVIRONMENT) dev $(ENVIRONMENT_OPTIONS)
	touch .venv/demo $@

# The learning half alone, without Triton's wheel, which needs numpy < 2. tests/test_learn_alone.py runs in it.
.venv-learn/ready: .venv/ready
	$(BIN)/python -m venv .venv-learn
	.venv-learn/bin/pip install --quiet --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		"torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')" \
		--editable '.[augment,clean,explain,parquet,search]'
	touch $@

# Each target does its own set-up: a virtual environment in .venv, and the dependencies, once for each setup.cfg.
# make quickstart   the main job on the embedded data, about ten minutes on two cores
# make test         every test        make lint types bench
PYTHON ?= python3
THREADS ?= $(shell nproc)
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/installed
export HF_HUB_DISABLE_TELEMETRY = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

.PHONY: quickstart test lint types bench
.DEFAULT_GOAL := test

$(STAMP): setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: export DATA = data
quickstart: export OMP_NUM_THREADS = $(THREADS)
quickstart: $(STAMP)
	$(BIN)/python tools/make_scenes.py data/scenes --processes $(THREADS)
	$(BIN)/accelerate launch --config_file launch/accelerate/one_process.yaml tools/pretrain.py configs/pretrain/quickstart.yaml
	$(BIN)/python tools/evaluate_retrieval.py runs/quickstart --shards 'data/scenes/val-*.tar'
	$(BIN)/python tools/evaluate_zero_shot.py runs/quickstart --images 'data/scenes/val-*.tar' --templates scenes
	$(BIN)/python tools/quickstart_report.py runs/quickstart data/scenes

# one thread a worker: tensors are tiny, and two workers with two threads each wait for each other
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/pyright

# SHARDS=FOLDER (tars of jpg and txt) measures the data path as well
bench: export OMP_NUM_THREADS = $(THREADS)
bench: $(STAMP)
	$(BIN)/python tools/make_scenes.py data/scenes --processes $(THREADS)
	$(BIN)/python benchmarks/train_step.py --captions data/scenes/captions.txt
	$(BIN)/python benchmarks/decoding.py
	$(if $(SHARDS),$(BIN)/python benchmarks/data_path.py $(SHARDS))

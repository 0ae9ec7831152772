# Each target does its own set-up: a virtual environment in .venv, and the dependencies, once for each setup.cfg.
# make quickstart   the main job on the embedded data, about a quarter of an hour on two cores
# make downstream   the five tasks from its checkpoint, about twenty minutes
# make test         every test        make lint types bench
# make soak         whole matrices that are too long for every day
PYTHON ?= python3
THREADS ?= $(shell nproc)
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/installed
export HF_HUB_DISABLE_TELEMETRY = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

.PHONY: quickstart downstream test soak lint types bench
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

# what follows the quickstart: every task fine-tuned from its checkpoint, in about twenty minutes; the page is runs/downstream.md
VAL := 'data/scenes/val-*.tar'
RECORD := --record runs/downstream
downstream: export DATA = data
downstream: export OMP_NUM_THREADS = $(THREADS)
downstream: $(STAMP)
	test -d runs/quickstart/checkpoints || $(MAKE) quickstart
	$(BIN)/python tools/evaluate_retrieval.py runs/quickstart --shards $(VAL) $(RECORD)/retrieval_before.json
	$(BIN)/python tools/evaluate_captioning.py runs/quickstart --shards $(VAL) --max-tokens 32 $(RECORD)/captioning_before.json
	$(BIN)/python tools/evaluate_zero_shot.py runs/quickstart --images $(VAL) --templates scenes $(RECORD)/zero_shot.json
	$(BIN)/python tools/linear_probe.py runs/quickstart --train 'data/scenes/train-*.tar' --val $(VAL) $(RECORD)/linear_probe.json
	$(BIN)/python tools/finetune_retrieval.py configs/finetune/retrieval_scenes.yaml $(RECORD)/retrieval.json
	$(BIN)/python tools/finetune_captioning.py configs/finetune/captioning_scenes.yaml $(RECORD)/captioning.json
	$(BIN)/python tools/finetune_vqa.py configs/finetune/vqa_scenes.yaml $(RECORD)/vqa.json
	$(BIN)/python tools/finetune_vqa.py configs/finetune/vqa_scenes.yaml start.weights=random optim.layer_decay=1 \
		run.folder=runs/vqa_scenes_random $(RECORD)/vqa_random.json
	$(BIN)/python tools/finetune_classification.py configs/finetune/classification_scenes.yaml $(RECORD)/classification.json
	$(BIN)/python tools/finetune_classification.py configs/finetune/classification_scenes.yaml start.weights=random \
		optim.layer_decay=1 run.folder=runs/classification_scenes_random $(RECORD)/classification_random.json
	$(BIN)/python tools/write_results.py configs/evaluate/downstream.yaml runs/downstream runs/downstream.md

# one thread a worker: tensors are tiny, and two workers with two threads each wait for each other
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

soak: export OMP_NUM_THREADS = 1
soak: $(STAMP)
	$(BIN)/python -m pytest -m soak --numprocesses $(WORKERS)

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

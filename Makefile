# Two commands set everything up: `make demo` and `make test`. Both are safe to run again.
# `make -j2 lint reproduce-smoke` and then `make tests shapes` is what CI runs.
PYTHON ?= python3
BIN := .venv/bin
PEERS := .venv-peers
PIP := $(BIN)/pip install -q
TORCH ?= $(shell grep '^torch==' constraints.txt)
DEMO := demo
# a process a core, each with one thread: more would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal
# Checking the shape and type of every argument takes three times what the tests take themselves, so
# it has a run of its own, over tests that together call every function with annotated shapes.
CHECK_SHAPES := --jaxtyping-packages=mpcache,mptrain,beartype.beartype
DATA := chat_template documents packing packing_lone_documents text_tokenizer token_flags
SHAPES := $(DATA:%=mpcache/data/test_%.py) mpcache/collection/test_chat_store.py \
          mpcache/collection/test_token_datasets.py mpcache/model/test_capture_part.py \
          mpcache/model/test_find_separation.py::test_both_kinds_of_attention \
          mpcache/model/test_lone_documents.py mpcache/model/test_splice.py mptrain/coders \
          mptrain/data/test_filters.py mptrain/evals mptrain/kernels mptrain/pursuit/test_refit.py \
          mptrain/training/test_micro_batch.py mptrain/training/test_normalization.py
RESIDUAL := layers.3,layers.5
MLP := layers.3.mlp,layers.5.mlp
COLLECT := mpcache collect data/model data/corpus/train.parquet $(DEMO)/store \
    --hookpoints $(RESIDUAL),$(MLP) --rows 320k --ctx-len 256 --part-rows 16384 --batch-sequences 16
COLLECT_ALL := mpcache collect data/model data/corpus/train.parquet $(DEMO)/all \
    --hookpoints layers.3,layers.5,layers.3.mlp --rows 1400k --ctx-len 256 --part-rows 16384 \
    --batch-sequences 16 --validation-every 43
FIT := --arch mp,topk --k 16 --expansion 8 --rows 256k --batch-rows 1024 --eval-every 25 \
       --eval-rows 8192 --save-every 50

# `make reproduce SET='coder.expansion=32 data.rows=8_000_000'` changes what the files say.
EXPERIMENTS := smollm2-demo llama-demo long-demo
SMALL := collect.rows=2048 collect.part_rows=1024 data.rows=1024 data.batch_rows=128 evaluation.eval_every=4 \
         evaluation.eval_rows=512 coder.expansion=2

.PHONY: install demo reproduce reproduce-smoke lint test slow tests shapes faults format peers peer-trainers clean
install: .venv/installed

# Without a GPU torch comes first and pinned, so that pip can take a CPU build where it is set up to
# find one (TORCH='torch==2.13.0 ...' passes further pip options); an open range would not.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null || $(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/$(COLLECT)
	$(BIN)/mptrain fit $(DEMO)/store --run $(DEMO)/sae --hookpoints $(RESIDUAL),$(MLP) --kind sae $(FIT)
	$(BIN)/mptrain fit $(DEMO)/store --run $(DEMO)/sst --hookpoints $(MLP) --kind skip-transcoder $(FIT)
	$(BIN)/mptrain plot $(DEMO)/sae $(DEMO)/sst --out $(DEMO)/fvu \
	    --title 'demo language model: 2048 latents, 256 000 rows'

# The twins of the original experiments, and longer runs. Stop or kill it: the same command goes on.
reproduce: install
	for name in $(EXPERIMENTS); do \
	    $(BIN)/mptrain sweep data/experiments/$$name.toml $(SET:%=--set %) || exit; \
	done

# The same figures of a few rows and small coders, in minutes; `-j2` makes two experiments at once.
reproduce-smoke: $(EXPERIMENTS:%=smoke-%)
smoke-%: install
	OMP_NUM_THREADS=1 $(BIN)/mptrain sweep data/experiments/$*.toml $(SMALL:%=--set %) \
	    --set folder=reproduce-smoke/$* --set root=reproduce-smoke/stores-$*

lint: install
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: lint tests

tests: install
	$(PYTEST) -m 'not slow'

# Whole commands that are killed, servers that fail, memory: some minutes more.
slow: install
	$(PYTEST) -m slow

shapes: install
	$(PYTEST) -m 'not slow' -k 'not held_out' $(CHECK_SHAPES) $(SHAPES:%=tests/%)

# Small faults, planted one at a time in a copy of the code: each must turn a test red.
# `make faults ONLY='bias order'` tries those whose names contain one of the words.
faults: install
	$(BIN)/python -m tests.planted_faults $(ONLY)

format: install
	$(BIN)/ruff format -q .
	$(BIN)/ruff check -q --fix .

# Other tools are installed beside our package, in an environment of their own.
$(PEERS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	command -v nvidia-smi >/dev/null || $(PEERS)/bin/pip install -q $(TORCH)
	$(PEERS)/bin/pip install -q -c constraints.txt -e '.[peers]'
	$(PEERS)/bin/pip install -q -c constraints.txt --no-deps overcomplete
	touch $@

# Comparisons with other tools; docs/benchmarks.md explains them.
peers: $(PEERS)/installed
	$(PEERS)/bin/$(COLLECT)
	$(PEERS)/bin/python -m benchmarks.compare_storage
	$(PEERS)/bin/python -m benchmarks.compare_loaders $(DEMO)/store --hookpoints layers.3
	$(PEERS)/bin/python -m benchmarks.compare_coders

# Trainers of other tools: hours. Stop or kill it: the same command goes on. `ONLY=sae-lens,topk`
# trains a part. Trainings that docs/data/trainers.csv has are not repeated.
peer-trainers: $(PEERS)/installed
	$(PEERS)/bin/$(COLLECT_ALL)
	for stage in search seeds long; do \
	    OMP_NUM_THREADS=1 $(PEERS)/bin/python -m benchmarks.compare_trainers train \
	        $(DEMO)/all --stage $$stage --only '$(ONLY)' || exit; \
	done
	$(PEERS)/bin/python -m benchmarks.compare_trainers table

clean:
	rm -rf .venv $(PEERS) $(DEMO) reproduce reproduce-smoke

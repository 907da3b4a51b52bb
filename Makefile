# Two commands set everything up: `make demo` and `make test`. Both are safe to run again.
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= $(shell grep '^torch==' constraints.txt)
DEMO := demo
# a process a core, each with one thread: more would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal
RESIDUAL := layers.3,layers.5
MLP := layers.3.mlp,layers.5.mlp
FIT := --arch mp,topk --k 16 --expansion 8 --rows 256k --batch-rows 1024 --eval-every 25 \
       --eval-rows 8192 --dead-rows 50k --save-every 50

# `make reproduce SET='coders.expansion=32 fit.rows=8_000_000'` changes what the files say.
TWINS := smollm2-demo llama-demo
SMALL := collect.rows=2048 collect.part_rows=1024 fit.rows=1024 fit.batch_rows=128 fit.eval_every=4 \
         fit.eval_rows=512 coders.expansion=2 coders.dead_rows=512 root=reproduce-smoke/stores

.PHONY: install demo reproduce reproduce-smoke test slow format clean
install: .venv/installed

# Without a GPU torch comes first and pinned, so that pip can take a CPU build where it is set up to
# find one (TORCH='torch==2.13.0 ...' passes further pip options); an open range would not.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/mpcache collect data/model data/corpus/train.parquet $(DEMO)/store \
	    --hookpoints $(RESIDUAL),$(MLP) --rows 320k --ctx-len 256 --part-rows 16384 --batch-sequences 16
	$(BIN)/mptrain fit $(DEMO)/store --run $(DEMO)/sae --hookpoints $(RESIDUAL),$(MLP) --kind sae $(FIT)
	$(BIN)/mptrain fit $(DEMO)/store --run $(DEMO)/sst --hookpoints $(MLP) --kind skip-transcoder $(FIT)
	$(BIN)/mptrain plot $(DEMO)/sae $(DEMO)/sst --out $(DEMO)/fvu \
	    --title 'demo language model: 2048 latents, 256 000 rows, Muon'

# The twins of the original experiments. Stop or kill it: the same command goes on.
reproduce: install
	for twin in $(TWINS); do \
	    $(BIN)/mptrain sweep data/experiments/$$twin.toml $(SET:%=--set %) || exit; \
	done

# The same figures of a few rows and small coders, in minutes.
reproduce-smoke: install
	for twin in $(TWINS); do \
	    $(BIN)/mptrain sweep data/experiments/$$twin.toml $(SMALL:%=--set %) \
	        --set run=reproduce-smoke/$$twin || exit; \
	done

test: install
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(PYTEST) -m 'not slow'

# Whole commands that are killed, servers that fail, memory: some minutes more.
slow: install
	$(PYTEST) -m slow

format: install
	$(BIN)/ruff format -q .
	$(BIN)/ruff check -q --fix .

clean:
	rm -rf .venv $(DEMO) reproduce reproduce-smoke

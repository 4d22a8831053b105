# Everything a person types. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

CACHE := $(or $(TRIBUTARY_CACHE),$(HOME)/.cache/tributary)
UV_VERSION := 0.13.8
UV := $(CACHE)/uv-$(UV_VERSION)/bin/uv
PY := .venv/bin/python
TYPED := crds lib operator/tributary_operator worker_image/tributary_worker dev/tributary_dev examples/docstrings benchmarks
export PYTHONPATH := examples/docstrings
export PYTHONDONTWRITEBYTECODE := 1
# One thread for each process: two cores are shared by pods, tests and the cluster.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test built test-unit test-worker test-privacy test-privacy-deepspeed test-cluster test-faults test-e2e check generate lock format env up down bench-aggregate bench-dp

help:            ## List these commands
	@grep -hE '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 32

demo: .venv/stamp ## Three data owners improve one model, which goes live under load (CONTEXT=<kube context> for your own cluster)
	$(PY) -m docstrings_demo $(if $(CONTEXT),--context $(CONTEXT))

test: built test-unit test-worker test-cluster test-e2e ## All tests: units and laws, real API server and S3, one story from end to end

test-unit: .venv/stamp ## Rows, laws, contract, charts
	.venv/bin/pytest -m "not cluster" tests/api tests/lib tests/operator tests/chart tests/dev tests/demo tests/benchmarks

test-worker: built .venv-worker/stamp ## The privacy engine and the stages of the worker
	.venv-worker/bin/pytest -m "not privacy_matrix" tests/worker

test-privacy: built .venv-worker/stamp ## The proofs of docs/privacy.md, every defect that they must find, and out/privacy.json
	TRIBUTARY_PRIVACY_REPORT=out/privacy.json .venv-worker/bin/pytest tests/worker/privacy tests/lib/test_accountant.py tests/lib/test_ledger.py

# Its shared-memory kernel is built for one DeepSpeed: others keep theirs apart.
test-privacy-deepspeed: .venv-deepspeed-$(VERSION)/stamp ## The engine's proofs on another DeepSpeed (VERSION=0.18.9; see requirements/)
	TORCH_EXTENSIONS_DIR=$(CACHE)/torch-extensions/deepspeed-$(VERSION) .venv-deepspeed-$(VERSION)/bin/pytest tests/worker/privacy

test-cluster: built ## Against the real API server and S3 of the embedded cluster
	.venv/bin/pytest -m cluster tests/lib tests/dev tests/cluster tests/faults

test-faults: built ## A round under every fault at every write; writes out/faults.json (PLANS=40 for a sample)
	TRIBUTARY_FAULT_PLANS=$(or $(PLANS),all) .venv/bin/pytest -s tests/faults

test-e2e: built .venv-worker/stamp ## One round and one release with real pods
	.venv/bin/pytest tests/e2e

built: .venv/stamp ## Build the embedded cluster's programs and the images, if they changed
	$(PY) -m tributary_dev prepare

check: .venv/stamp ## Format, lint, types, boundaries, generated files
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy $(TYPED)
	.venv/bin/lint-imports
	$(PY) -m tributary_api.crdgen --check

format: .venv/stamp ## Format the code
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

generate: .venv/stamp ## Write the generated files
	$(PY) -m tributary_api.crdgen

up: .venv/stamp ## Start the embedded cluster of this checkout
	$(PY) -m tributary_dev up

down: .venv/stamp ## Take the embedded cluster down, without residue
	$(PY) -m tributary_dev down

env: .venv/stamp .venv-worker/stamp ## Only the two Python environments

# Names, versions and hashes, and no address of an index: whoever installs chooses theirs.
COMPILE = $(UV) pip compile -q --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make lock"
# Besides the worker's own: the last of each earlier minor version that the engine is proven on.
DEEPSPEED_VERSIONS := 0.17.6 0.18.9
lock: $(UV) ## Resolve the dependencies anew
	$(COMPILE) requirements/operator.in -o requirements/operator.txt
	$(COMPILE) requirements/worker.in -o requirements/worker.txt
	$(COMPILE) requirements/dev.in -c requirements/operator.txt -o requirements/dev.txt
	$(COMPILE) requirements/worker-dev.in -c requirements/worker.txt -o requirements/worker-dev.txt
	for version in $(DEEPSPEED_VERSIONS); do \
		echo "deepspeed==$$version" | $(COMPILE) --no-deps - -o requirements/deepspeed-$$version.txt; \
	done
	$(COMPILE) requirements/bench.in -c requirements/worker.txt -o requirements/bench.txt
	$(COMPILE) requirements/bench-flower.in -o requirements/bench-flower.txt

$(UV):
	@python3 -m venv $(CACHE)/uv-$(UV_VERSION) || \
		{ echo "python3 cannot make virtual environments: install python3-venv and try again." >&2; exit 1; }
	$(CACHE)/uv-$(UV_VERSION)/bin/pip install --quiet uv==$(UV_VERSION)
	@$(UV) python find --no-python-downloads --quiet 3.11 >/dev/null || \
		{ echo "Python 3.11 is needed, with its venv module: install it and try again." >&2; exit 1; }

.venv/stamp: requirements/dev.txt | $(UV)
	[ -x .venv/bin/python ] || $(UV) venv --quiet --python 3.11 .venv
	$(UV) pip sync --quiet --python .venv/bin/python --require-hashes $<
	$(UV) pip install --quiet --python .venv/bin/python --no-deps --editable .
	touch $@

# torch and its libraries: about 6 GB, hard-linked from uv's cache.
.venv-worker/stamp: requirements/worker-dev.txt | $(UV)
	[ -x .venv-worker/bin/python ] || $(UV) venv --quiet --python 3.11 .venv-worker
	$(UV) pip sync --quiet --python .venv-worker/bin/python --require-hashes $<
	$(UV) pip install --quiet --python .venv-worker/bin/python --no-deps --editable .
	touch $@

# The worker's environment with another DeepSpeed in it.
.venv-deepspeed-%/stamp: requirements/worker-dev.txt requirements/deepspeed-%.txt | $(UV)
	[ -x $(@D)/bin/python ] || $(UV) venv --quiet --python 3.11 $(@D)
	$(UV) pip sync --quiet --python $(@D)/bin/python --require-hashes $<
	$(UV) pip install --quiet --python $(@D)/bin/python --no-deps --require-hashes -r requirements/deepspeed-$*.txt
	$(UV) pip install --quiet --python $(@D)/bin/python --no-deps --editable .
	touch $@

# Extensions of torch are built for one environment: shared with .venv-worker they would be built again each time.
BENCH = PYTHONPATH=benchmarks:tests TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv-bench/extensions .venv-bench/bin/python -m

bench-aggregate: .venv-bench/stamp .venv-flower/stamp ## Aggregation against Flower and the bare store (CASES=small or 124m,355m,5gb-4,...)
	$(BENCH) tributary_bench.aggregation --cases $(or $(CASES),all) $(if $(REPEATS),--repeats $(REPEATS))

bench-dp: .venv-bench/stamp ## A private step against plain DeepSpeed and Opacus (METHODS="lora full")
	$(BENCH) tributary_bench.training $(if $(METHODS),--methods $(METHODS))

# The worker's libraries and Opacus: what benchmarks/ runs in.
.venv-bench/stamp: requirements/bench.txt | $(UV)
	[ -x .venv-bench/bin/python ] || $(UV) venv --quiet --python 3.11 .venv-bench
	$(UV) pip sync --quiet --python .venv-bench/bin/python --require-hashes $<
	$(UV) pip install --quiet --python .venv-bench/bin/python --no-deps --editable .
	touch $@

# Flower by itself: it pins another typer than transformers does. Our own code lies beside it, without torch.
.venv-flower/stamp: requirements/bench-flower.txt | $(UV)
	[ -x .venv-flower/bin/python ] || $(UV) venv --quiet --python 3.11 .venv-flower
	$(UV) pip sync --quiet --python .venv-flower/bin/python --require-hashes $<
	$(UV) pip install --quiet --python .venv-flower/bin/python --no-deps --editable .
	touch $@

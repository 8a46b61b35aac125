# make course   the whole course on the embedded data set      -> runs/<name>/report.html
# make course DATA=folder   the same on your own image/SWC pairs
# make test     lint, notebooks against their texts, unit tests, every notebook
# make notebooks [NAMES=03]   write and execute notebooks from their texts
# make site     the course as web pages                           -> build/site/index.html
# make faults   tests too slow for every day: a hundred kills, notebooks twice, all in JupyterLab
# make bench    speed compared with other implementations       -> data/results/bench.json
# make lab      JupyterLab;   make lint;   make clean
#
# Each works by itself, on a machine that has nothing but Python 3.11 or newer.

PYTHON ?= python3
DATA ?= synthetic
PROFILE ?= course
NAME ?=
NAMES ?=
# More options for pip, such as `-r binder/torch-cpu.txt` for torch without CUDA on Linux.
INSTALL_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Idle OpenMP threads must sleep: where cores are shared, spinning ones slow a ViT six times.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: course test notebooks lint lab faults bench site clean
.NOTPARALLEL:

course: $(INSTALLED)
	$(BIN)/neurolib run --data "$(DATA)" --profile "$(PROFILE)" --name "$(NAME)"

# --nbval-current-env: the kernel of .venv, whatever kernels the user has registered.
test: lint
	$(BIN)/python tools/build.py --check
	$(BIN)/python -m pytest --nbval --nbval-current-env \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg tests notebooks/[0-9]*.ipynb

notebooks: $(INSTALLED)
	$(BIN)/python tools/build.py $(NAMES)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(INSTALLED)
	$(BIN)/jupyter lab --ip 127.0.0.1 notebooks

# Slow: killed processes, notebooks twice in one kernel, all of them in JupyterLab.
faults: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[cluster]"
	NEUROLIB_FAULTS=1 $(BIN)/python -m pytest tests/test_faults.py
	NEUROLIB_FAULTS=1 $(BIN)/python -m pytest -k "killed or larger_than_memory" \
	  tests/test_large.py tests/test_training.py tests/test_runs.py
	$(BIN)/python tools/build.py --twice
	NOTEBOOKS=all $(BIN)/python -m pytest tests/test_browser.py

# Under a quarter of an hour on two cores that have nothing else to do.
bench: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt $(INSTALL_FLAGS) -e ".[bench]"
	$(BIN)/python benchmarks/bench.py --out data/results/bench.json

site: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/site

# Results in runs/ stay.
clean:
	rm -rf $(VENV) build dist docs/api docs/notebooks *.egg-info .pytest_cache .ruff_cache .hypothesis
	find neurolib notebooks tests -name __pycache__ -prune -exec rm -rf {} +

# An environment that an interrupted installation left half-finished still has the file
# .incomplete and is built again; the file becomes the stamp when everything is in place.
CHECK := import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed, \
  this is " + sys.version.split()[0] + "; choose another: make PYTHON=python3.12")
$(INSTALLED): pyproject.toml constraints.txt
	@if test -e $(VENV)/.incomplete; then rm -rf $(VENV); fi
	@test -x $(BIN)/pip || $(PYTHON) -c '$(CHECK)'
	@mkdir -p $(VENV) && touch $(VENV)/.incomplete
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(INSTALL_FLAGS) -e ".[test]"
	@mv $(VENV)/.incomplete $@

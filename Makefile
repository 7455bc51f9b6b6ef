# Two commands do everything on a fresh Linux machine with Python, a C++ compiler and make:
#   make demo    install, export the embedded model for a Jetson, ask it three questions about a picture
#   make test    install, linters, type checker, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := bundles/demo
PICTURE := cobra_edge/mini/demo.png

.PHONY: demo test lint check figures clean

$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

$(VENV)/export: $(VENV)/pip pyproject.toml
	@echo "installing cobra-edge with its export extra; torch is large, this takes some minutes the first time"
	$(BIN)/pip install --quiet -e ".[export]"
	touch $@

$(VENV)/dev: $(VENV)/pip pyproject.toml
	@echo "installing cobra-edge with its dev extra; torch is large, this takes some minutes the first time"
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/export

demo: $(VENV)/export
	$(BIN)/cobra-edge export --target jetson --out $(DEMO) --force
	@echo; echo "the picture: $(PICTURE)"
	@for question in "What is in the image?" "How many objects are there?" "Is there a red circle?"; do \
	  echo; echo "> $$question"; \
	  $(BIN)/cobra-edge run $(DEMO) --image $(PICTURE) --prompt "$$question" || exit $$?; \
	done

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: $(VENV)/dev
	$(BIN)/pytest

test: lint check

figures: $(VENV)/dev
	$(BIN)/python -m cobra_edge.bench.figures

clean:
	rm -rf $(VENV) bundles build dist .mypy_cache .pytest_cache .ruff_cache

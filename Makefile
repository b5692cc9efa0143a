PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help serve test lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

serve: $(INSTALLED) ## serve the embedded model on 127.0.0.1:8000; ARGS="MODEL --port 8001 ..." passes more
	$(BIN)/strace-llm serve $(ARGS)

test: $(INSTALLED) ## run the tests; ARGS="-k name" passes more
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED) ## measure the modes against each other; wants an idle machine
	$(BIN)/python benchmarks/modes.py $(ARGS)

clean: ## remove the environment and every cache
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that is there already is completed, not replaced.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,lint]'
	touch $@

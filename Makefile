# `make demo` and `make test` need Python 3.11 or newer, pip and git; they install the rest into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
export PORT ?= 8000

.PHONY: help setup demo test test-dashboards test-layouts test-deploy lint clean

help: ## this list
	@grep -E '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: ## install vLLM, the plugin, the demo model and the tools into .venv
	@deploy/local/setup.sh

demo: setup ## serve a model compressed on http://127.0.0.1:$PORT (PORT=8000 MODEL=smollm2 PRESET=k8v4)
	@deploy/local/demo.sh

# Two processes, a file in one of them; ARGS='-n 0' runs all in one.
test: setup ## run all tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS) || { echo "make test: a test failed; the first failure above says which (make test ARGS='-n 0 -x -k NAME' runs one alone)." >&2; exit 1; }

test-vllm-%: setup ## the tests marked each_vllm with another version on a CPU: make test-vllm-0.33.0
	@folder=$$($(BIN)/python deploy/local/newer_vllm.py $*) && \
	PYTHONPATH=$$folder $(BIN)/python -m pytest -n 2 --dist loadfile -m each_vllm $(ARGS)

test-dashboards: setup ## every panel and alert against a real Prometheus (apt-get install prometheus)
	promtool test rules deploy/prometheus/rules_test.yaml
	@$(BIN)/python tests/e2e/check_dashboards.py

test-layouts: setup ## metrics with several API servers, engines and ranks, and after restarts
	@$(BIN)/python tests/e2e/check_layouts.py

test-deploy: ## check Dockerfile, compose file and Helm chart with tools from PyPI
	@deploy/check.sh

lint: setup ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove .venv, builds and caches (the converted demo model stays in the user's cache)
	rm -rf .venv .venv-deploy build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

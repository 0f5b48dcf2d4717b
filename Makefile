# Every target sets itself up first (a .venv from requirements.lock); that part is skipped when nothing changed.
SHELL := bash
VENV := .venv
PYTHON := $(VENV)/bin/python
STUBS := session_pb2.py session_pb2.pyi session_pb2_grpc.py
.DEFAULT_GOAL := help
.PHONY: help setup demo play eval bench-streaming test test-full lint format proto proto-check pipelines lock clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done

setup: ## make .venv, installing what it needs
	@tools/setup.sh

demo: setup ## the whole path: play a game, train, register, serve, stream; results in runs/demo
	@$(VENV)/bin/minwm demo

WORLD ?= $(firstword $(wildcard models/wan-doom/model) runs/demo/world)
WALK ?= l*4,j*8,w*2,l*6,w*2,s*3,j*4,d*2,l*4
play: setup ## serve a world and walk through it (WORLD=runs/demo/world WALK='l*4,w*2,j*6'); video in runs/play
	@$(VENV)/bin/minwm demo --world $(WORLD) --keys '$(WALK)' --out runs/play

eval: setup ## measure the shipped model on play it has never seen; results in runs/eval/wan-doom.{json,html}
	@$(VENV)/bin/minwm eval $(if $(wildcard models/wan-doom/model),models/wan-doom/model,models/wan-doom/base --autoencoder models/wan-doom/autoencoder) \
		--base models/wan-doom/base --judge models/doom-judge $(patsubst %,--teacher %,$(wildcard models/wan-doom/teacher.npz)) --full --record --data runs/eval/play --out runs/eval/wan-doom

bench-streaming: setup ## how fast sessions stream here, beside the limit; runs/bench/streaming.json, plots in docs/assets
	@$(PYTHON) benchmarks/streaming.py --out runs/bench/streaming.json --plots docs/assets

test: setup ## the tests that fit in 10 minutes on two cores
	@$(PYTHON) -m pytest -m "not slow" --session-timeout 388 --numprocesses 2 --dist worksteal tests/unit tests/parity
	@$(PYTHON) -m pytest -m "not slow" --session-timeout 212 tests/integration tests/e2e

test-full: setup ## every test
	@$(PYTHON) -m pytest

lint: setup proto-check ## style, formatting, types, generated code up to date
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy

format: setup ## rewrite the code in the repository's format
	@$(VENV)/bin/ruff check --fix-only --quiet
	@$(VENV)/bin/ruff format

# The mapping makes the stubs import each other as minwm.client.v1.
protoc = $(PYTHON) -m grpc_tools.protoc -Iminwm/client/v1=proto/minwm/session/v1 \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) minwm/client/v1/session.proto

proto: setup ## generate the gRPC stubs from proto/
	@$(call protoc,libs/minwm)

proto-check: setup ## fail when the stubs are not what proto/ generates
	@rm -rf build/proto && mkdir -p build/proto && $(call protoc,build/proto)
	@for stub in $(STUBS); do \
		diff -u libs/minwm/minwm/client/v1/$$stub build/proto/minwm/client/v1/$$stub || \
			{ echo "proto-check: $$stub is out of date; run: make proto"; exit 1; }; \
	done

pipelines: setup ## compile the Kubeflow pipelines to build/pipelines
	@$(VENV)/bin/minwm pipelines compile --out build/pipelines

lock: ## resolve the requirements again into requirements.lock (UPGRADE=1 takes newer versions)
	@tools/lock.sh

clean: ## remove what the other targets made, .venv included; results in runs/ stay
	rm -rf $(VENV) .uv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv-peers/.installed
JUDGES := .venv-judges/.installed
SANITIZED := build/sanitized
NATIVE := $(wildcard strace/native/*.cpp strace/native/*.h strace/native/CMakeLists.txt)

.DEFAULT_GOAL := help
.PHONY: help serve test lint bench bench-peers judge native-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

serve: $(INSTALLED) ## serve the embedded model on 127.0.0.1:8000; ARGS="MODEL --port 8001 ..." passes more
	$(BIN)/strace-llm serve $(ARGS)

test: $(INSTALLED) ## run the tests; ARGS="-k name" passes more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

native-check: $(INSTALLED) ## run the native runner's tests under the address and undefined-behaviour sanitizers
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S strace/native -B $(SANITIZED) -G Ninja -DSTRACE_SANITIZE=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)
	STRACE_NATIVE_LIBRARY=$(SANITIZED)/libstrace_native.so ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/strace/native $(ARGS)

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED) ## measure the modes against each other; wants an idle machine
	$(BIN)/python benchmarks/modes.py $(ARGS)

bench-peers: $(INSTALLED) $(PEERS) ## measure us beside transformers, llama.cpp and OpenVINO; ARGS="--help" tells more
	$(BIN)/python benchmarks/peers.py $(ARGS)

judge: $(INSTALLED) $(JUDGES) ## let lm-evaluation-harness, litellm, an older openai client and aiperf judge the server
	$(BIN)/python benchmarks/judge.py $(ARGS)

clean: ## remove the environment and every cache
	rm -rf .venv .venv-peers .venv-judges build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -rf $(addprefix strace/native/,CMakeCache.txt CMakeFiles .cmake build.ninja cmake_install.cmake libstrace_native.so)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that is there already is completed, not replaced.
$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,lint]'
	touch $@

# llama.cpp is compiled for this machine; GCC 12.2 drops the stores of ldtilecfg's configuration as dead, and a machine with
# AMX then dies in it (llama.cpp PR #26954). optimum-intel's torchvision is of no use to a language model.
$(PEERS): constraints-peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS=-fno-tree-dse" .venv-peers/bin/python -m pip install -c constraints-peers.txt \
		--no-binary llama-cpp-python llama-cpp-python gguf torch optimum-intel openvino nncf
	.venv-peers/bin/python -m pip uninstall -y torchvision
	touch $@

$(JUDGES): constraints-judges.txt
	test -x .venv-judges/bin/python || $(PYTHON) -m venv .venv-judges
	.venv-judges/bin/python -m pip install -c constraints-judges.txt torch 'lm-eval[api,hf]' litellm openai aiperf
	touch $@

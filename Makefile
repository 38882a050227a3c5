# One environment, made once, and made anew when the dependencies change. The demo's part of it is smaller and faster
# to install.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= out
DEMO_EXTRAS := cpu,export,serve
EXTRAS := cpu,export,hub,plugins,serve,ray,otel,bench,eval,tensorrt-rtx,test,dev
BENCH := $(OUT)/bench
LAYERS ?= 4
ROUNDS ?= 9
PROCESSES ?= 2
9B := $(BENCH)/9b$(LAYERS)

.DEFAULT_GOAL := help
.PHONY: help demo install test-fast test test-more charts clients slow-list foreign-names bench gpu-check lint format wheel sdist clean

help:  ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

NEEDS := Makefile pyproject.toml setup.py constraints.txt $(wildcard plugins/glm4_plugins/cpu/*)
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glm4-deploy needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch and the other packages into $(VENV); pip shows the progress of each download."
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(1)]'
endef

# These files remember what the environment was made for.
$(VENV)/.demo: $(NEEDS)
	$(call install,$(DEMO_EXTRAS))
	touch $@

$(VENV)/.installed: $(NEEDS)
	$(call install,$(EXTRAS))
	@# asks for an older protobuf than Ray takes; the tests read its message definitions only
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt tritonclient
	touch $@

demo: $(firstword $(wildcard $(VENV)/.installed) $(VENV)/.demo)  ## export the demo checkpoint, check it against PyTorch, continue a text
	mkdir -p $(OUT)
	$(BIN)/glm4-deploy export demo/glm4-tiny $(OUT)/demo --precision fp32 --force
	$(BIN)/glm4-deploy generate $(OUT)/demo "And it came to pass" --max-tokens 64 --temperature 0.7 --top-k 20 --seed 2 --stream
	$(BIN)/glm4-deploy generate $(OUT)/demo "Who are you?" --chat --stream

install: $(VENV)/.installed  ## install all that the tests need, 4 GB

# Tests of one file stay in one process, as they share what they export. Tests that measure time run after the others.
SIDE_BY_SIDE := -n $(PROCESSES) --dist loadfile
test-fast: $(VENV)/.installed  ## run the quick tests: the loop while writing, about 3 minutes
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not alone and not more"

test: $(VENV)/.installed  ## run the test suite, about 12 minutes
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not alone and not more"
	$(BIN)/python -m pytest -m "alone and not more"

slow-list: $(VENV)/.installed  ## measure the tests, and write tests/slow.txt: those that test-fast leaves out
	$(BIN)/python -m pytest -m "not more" --write-slow

# The chart's checks bring Helm and Kubernetes' schemas, 350 MB.
CHARTS := helm-python-sdk kubernetes-validate
test-more: $(VENV)/.installed charts clients  ## run the tests that take minutes each: soak, kills, fuzzing, client libraries
	$(BIN)/python -m pytest -m more

charts: $(VENV)/.installed  ## install what the tests of the Helm chart need
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(CHARTS)

# Their libraries need other versions of openai, anthropic and more than the tests do.
clients: $(OUT)/clients/.installed  ## the environment of client libraries that test-more tries against the server

$(OUT)/clients/.installed: tests/clients/requirements.txt
	test -x $(OUT)/clients/bin/python || $(PYTHON) -m venv $(OUT)/clients
	$(OUT)/clients/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

# The suite holds the names that we use of these packages against their pinned versions.
FOREIGN := tensorrt-cu13-bindings tensorrt-lean-cu13-libs tensorrt-rtx tensorrt-rtx-cu13 tensorrt-rtx-cu13-bindings \
	tensorrt-rtx-cu13-libs polygraphy cuda-bindings cuda-pathfinder
foreign-names: $(VENV)/.installed  ## hold the names that we use of TensorRT and CUDA against their newest versions (250 MB)
	rm -rf $(OUT)/newest
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OUT)/newest $(FOREIGN)
	PYTHONPATH=$(CURDIR)/$(OUT)/newest $(BIN)/python -m pytest -s tests/deploy/test_foreign_names.py

PEER_OPTIONS = --environments $(BENCH)/environments --rounds $(ROUNDS) $(if $(CAP),--cap $(CAP))
# Not with CAP=avx2: these cannot be limited, or fail.
MORE_INT8 := ,openvino:int8,ort-genai:int8,transformers:bf16
LONG_CACHES := ,llama.cpp:q8_0+kv8,openvino:int8,ort-genai:int8
MORE_INT4 := ,llama.cpp:q4_k_m,openvino:int4-head,ort-genai:int4

# Beside the peers on weights of the 9B's widths, in LAYERS layers. The peers' environments and weights are kept for the next time.
bench: $(9B)-int8/manifest.json $(9B)-int4-head/manifest.json  ## beside llama.cpp, OpenVINO and others (2 hours, 30 GB of disk)
	benchmarks/peers/setup.sh $(BENCH)/environments $(PYTHON) $(CAP)
	$(BIN)/python -m benchmarks.peers $(9B) $(9B)-int8 --out $(9B)-peers-int8$(CAP) $(PEER_OPTIONS) \
		--peers llama.cpp:q8_0,openvino:int8+f32$(if $(CAP),-inputs,$(MORE_INT8))
	$(if $(CAP),,$(BIN)/python -m benchmarks.peers $(9B) $(9B)-int8 --out $(9B)-peers-long $(PEER_OPTIONS) \
		--contexts 4096,16384,32640 --peers llama.cpp:q8_0$(LONG_CACHES))
	$(BIN)/python -m benchmarks.peers $(9B) $(9B)-int4-head --out $(9B)-peers-int4$(CAP) $(PEER_OPTIONS) \
		--peers llama.cpp:q4_0,openvino:int4-head+f32$(if $(CAP),-inputs,$(MORE_INT4))

$(9B)/config.json: | $(VENV)/.installed
	$(BIN)/python benchmarks/make_checkpoint.py $(9B) --size 9b --layers $(LAYERS)

$(9B)-int8/manifest.json: $(9B)/config.json
	$(BIN)/glm4-deploy export $(9B) $(@D) --target cpu --precision int8 --no-parity --force

$(9B)-int4-head/manifest.json: $(9B)/config.json benchmarks/peers/int4-head.toml
	$(BIN)/glm4-deploy export $(9B) $(@D) --target cpu --precision int4 --recipe benchmarks/peers/int4-head.toml \
		--max-seq-len 4096 --no-parity --force

# Not in the environment of the others: a GPU host is often offline, and has its own torch and Triton.
gpu-check:  ## on a GPU host: kernels, engines and ort bundle, right and how fast (with PYTHON, offline)
	PYTHONPATH=.:exporters:runtime:plugins $(PYTHON) -m benchmarks.gpu_check

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32
	$(BIN)/mypy --platform darwin

format: $(VENV)/.installed  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# In an environment of its own: a wheel needs neither torch nor the rest of what the tests need.
wheel:  ## build dist/*.whl, which needs neither the environment of the others nor torch
	test -x $(OUT)/build/bin/python || $(PYTHON) -m venv $(OUT)/build
	$(OUT)/build/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build
	$(OUT)/build/bin/python -m build --wheel --outdir dist .

sdist: wheel  ## build dist/*.tar.gz too, and check what both say of themselves
	$(OUT)/build/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt twine
	$(OUT)/build/bin/python -m build --sdist --outdir dist .
	$(OUT)/build/bin/python -m twine check --strict dist/*

clean:  ## remove what was made, but not the environment
	rm -rf build dist $(OUT) .mypy_cache .pytest_cache .ruff_cache *.egg-info

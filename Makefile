# make demo    install into .venv, then the whole job on the embedded model: data, drafter, head, measurement
# make real    install likewise, then fetch SmolLM2-135M, measure it with coral's drafter, and let it answer a question
# make test    install likewise, then run the tests (no network, no GPU)
# make lint    ruff and mypy
# make wheel   dist/*.whl
# make docs    build/site: the pages of docs/ as a site, links and anchors checked
#
# PYTHON  the interpreter that makes .venv (3.10 to 3.13)
# TORCH   what pip installs as torch; the default is the release this is tested with

PYTHON ?= python3
TORCH ?= torch==2.13.0
CPU_TORCH ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo real test lint wheel docs clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/coral prepare-data recipes/demo.yaml
	$(BIN)/coral train recipes/demo.yaml
	$(BIN)/coral group-head recipes/demo.yaml
	$(BIN)/coral eval recipes/demo.yaml
	@echo
	@echo "The drafter and the head are in runs/demo. To talk with the model, drafted and plain:"
	@echo "    $(BIN)/coral chat recipes/demo.yaml --speculative"
	@echo "    $(BIN)/coral chat recipes/demo.yaml --no-speculative"

REAL := runs/models/smollm2-135m.gguf
TALK := chat recipes/smollm2-135m.yaml target.model=$(REAL)

real: .venv/real
	$(BIN)/python -m recipes.real.fetch --to $(dir $(REAL))
	@if test -d coral_core/shipped/smollm2-135m/drafter || test -d runs/smollm2-135m/drafter; then set -e; \
		$(BIN)/coral eval recipes/smollm2-135m.yaml target.model=$(REAL) --limit 2 decode.max_new_tokens=96; \
		echo "What is the capital of France?" | $(BIN)/coral $(TALK) --speculative; \
		echo "To talk with it: $(BIN)/coral $(TALK) --speculative"; \
	else \
		echo "This checkout has no drafter for SmolLM2-135M: it answers plainly. recipes/smollm2-135m.yaml makes one."; \
		echo "What is the capital of France?" | $(BIN)/coral $(TALK) --no-speculative; \
	fi

test: .venv/tested
	$(BIN)/python -m pytest -q

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/installed
	rm -rf build dist
	$(PIP) wheel --no-deps --wheel-dir dist .
	@ls -l dist

docs: .venv/installed
	$(PIP) install --no-compile --editable '.[docs]'
	$(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# On Linux, PyPI's torch brings several GB of CUDA libraries along. Without an NVIDIA driver, PyTorch's own index of CPU
# builds is asked first; where it cannot be reached, pip goes on with what it is configured to find.
# --no-compile: Python compiles what is imported, when it is; compiling everything at once took longer than installing it.
.venv/installed: pyproject.toml
	@echo "installing coral and what it needs into .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null || \
		$(PIP) --quiet --retries 0 install --no-compile --no-deps --index-url $(CPU_TORCH) '$(TORCH)' || true
	$(PIP) install --no-compile '$(TORCH)'
	$(PIP) install --no-compile --editable .
	@touch $@

.venv/real: .venv/installed
	$(PIP) install --no-compile --editable '.[gguf]'
	@touch $@

.venv/tested: .venv/installed
	$(PIP) install --no-compile --editable '.[test]'
	@touch $@

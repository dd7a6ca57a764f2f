# make demo, make test, make lint: each first sets up what it needs in .venv; a second call sets up nothing.
#
#   CPU=1       onnxruntime instead of onnxruntime-gpu (340 MB), where the project would take the latter
#   TORCH=...   another torch, for instance TORCH=torch==2.11.0
#   PYTHON=...  the Python, 3.11 or newer, that makes .venv
#   JOBS=2      test processes

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
pip := .venv/bin/python -m pip
choice := $(if $(filter-out 0,$(CPU)),cpu,default) $(TORCH)

.PHONY: demo test lint clean FORCE

demo: .venv/demo.stamp
	.venv/bin/rewriter demo

# Each process with one thread: two of them on two cores would otherwise wait for each other.
test: .venv/test.stamp
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses=$(JOBS)

lint: .venv/test.stamp
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python -m pytest tests/test_layering.py

clean:
	rm -rf .venv build dist *.egg-info demo

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Rewritten when the choice differs from the last one, and then every stamp is out of date.
ifneq ($(choice),$(shell cat .venv/choice 2>/dev/null))
.venv/choice: FORCE
endif
.venv/choice: | .venv/bin/python
	$(pip) uninstall --yes onnxruntime onnxruntime-gpu  # both own the folder onnxruntime: never both
	echo "$(choice)" > $@

.venv/demo.stamp: extras := demo
.venv/test.stamp: extras := dev,demo,interop

# torch first, so that its own index or wheel decides between the CPU and the CUDA build.
.venv/demo.stamp .venv/test.stamp: pyproject.toml .venv/choice
	$(pip) install "$(TORCH)"
ifeq ($(firstword $(choice)),cpu)
	.venv/bin/python .ci/cpu_requirements.py $(extras) > .venv/requirements.txt
	$(pip) install --requirement .venv/requirements.txt
	$(pip) install --no-deps --editable .
else
	$(pip) install --editable ".[$(extras)]"
endif
	touch $@

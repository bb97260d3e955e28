# Two commands: `make demo` and `make test`. Each builds what it needs in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
IMAGE ?=
ARGS ?=

.PHONY: demo test models lint bench docs clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/port_pretrained.py $(if $(IMAGE),--image "$$IMAGE")

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Models of Flax, Equinox, Haiku and Keras, in their own libraries: minutes, and not part of `make test`.
models: export JCONV_STORE =
models: $(VENV)/models.stamp
	$(BIN)/python -m pytest tests/models $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Huge pages: else what is above 32 MiB times the kernel's page faults, for every contender alike.
bench: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
bench: export JCONV_STORE =
bench: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/problems.py $(ARGS)
	$(BIN)/python benchmarks/networks.py $(ARGS)
	$(BIN)/python benchmarks/report.py $(if $(filter --quick,$(ARGS)),benchmarks/results/quick)

docs: $(VENV)/docs.stamp
	$(BIN)/pdoc --docformat google --output-directory site jconv jconv.nnx jconv.linen jconv.interop jconv.tuning jconv.explaining jconv.parity

$(VENV)/%.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV)

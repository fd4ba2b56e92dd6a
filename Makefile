# make demo and make test do all set-up themselves: a virtual environment in .venv, the
# dependencies, the native build. Each step runs again only when what it depends on has changed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := setup.py CMakeLists.txt $(shell find csrc -name '*.[ch]*' 2>/dev/null)

.PHONY: install demo test races bench bench-training compare models lint format gpu clean

install: $(VENV)/.built

$(VENV)/.dependencies: pyproject.toml
	@echo "memtl: getting what it needs into $(VENV); torch is the largest part"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel cmake ninja pybind11 "torch>=2.11"
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@echo "memtl: compiling kernels, which takes minutes (MEMTL_CUDA=0 leaves those for GPUs out)"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@
	@echo "memtl: done. Next: source $(VENV)/bin/activate; memtl doctor"

demo: install
	$(BIN)/memtl demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# CUDA kernels in the host shim, by the thread sanitiser: whatever no barrier orders is reported.
# It takes minutes. Without address randomisation, which older sanitisers do not cope with.
races: install
	$(BIN)/cmake -G Ninja -S . -B build/races -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DMEMTL_MODULE=OFF -DMEMTL_TESTS=ON -DMEMTL_SANITIZE=THREAD
	$(BIN)/cmake --build build/races
	setarch -R $(BIN)/ctest --test-dir build/races --output-on-failure -R 'cuda|host'

bench: install
	$(BIN)/python benchmarks/kernels/table.py

bench-training: install
	$(BIN)/python benchmarks/training/table.py

compare: install
	$(BIN)/python -m benchmarks.training.comparison

models: install
	$(BIN)/python benchmarks/models/table.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# On a machine with a card, with or without a network: builds for that card with the Python that is
# there (PYTHON=...: one with torch, timm, transformers and pytest), tests, in several processes where
# pytest-xdist is there too, then measures for MINUTES.
MINUTES ?= 4
gpu:
	MEMTL_CUDA_ARCHS=native $(PYTHON) -m pip install --quiet --no-index --no-deps \
	    --no-build-isolation --editable .
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m gpu $$($(PYTHON) -c "import xdist; print('-n auto')" 2>/dev/null)
	$(PYTHON) benchmarks/gpu.py --minutes $(MINUTES)

clean:
	rm -rf build dist *.egg-info memtl/*.so memtl/_build.json $(VENV)/.built

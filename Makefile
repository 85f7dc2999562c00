# Everything runs in .venv, which is made here: a fresh machine needs Python 3.10 or newer and nothing else.
PYTHON ?= python3
PIP := .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
BIN := .venv/bin/

.PHONY: run test test-all test-floor lint bench clean

# Trains on real faces (quick), then times the loss on this machine. Results go to out/. Passive threads: those that spin
# make a step many times slower where others want the cores.
run: .venv/run
	$(BIN)python -m amsoftmax_kernels
	$(BIN)python -m bench faces --quick --out out/faces
	OMP_WAIT_POLICY=passive $(BIN)python -m bench loss --quick --out out/loss
	@echo
	@echo "out/faces/faces.png shows how well a network tells apart people it has never seen, trained with softmax and with AM-Softmax."
	@echo "out/loss/loss.png shows time and peak memory of a step against the number of classes, beside plain PyTorch's."
	@echo "All of it ran on this machine's CPU; README.md says how to train with the loss, and what is proven on a GPU."

test: .venv/test lint
	$(BIN)python -m pytest --numprocesses auto --dist worksteal

# Also the slow sweeps that find little more: every variant of every kernel compiled, the default training.
test-all: .venv/test lint
	$(BIN)python -m pytest --numprocesses auto --dist worksteal -m "slow or not slow"

# The same tests with the oldest PyTorch that pyproject.toml admits.
test-floor: .venv-floor/test
	.venv-floor/bin/python -m pytest --numprocesses auto --dist worksteal

.venv-floor/test: pyproject.toml
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet --disable-pip-version-check 'torch==2.10.*' --editable '.[test]'
	touch $@

lint: .venv/test
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

# The full benchmarks, beside the peers: times and memory of single steps with their picture, then ratios, in turns.
bench: .venv/peers
	$(BIN)python -m bench faces --out out/faces
	$(BIN)python -m pytest bench --benchmark-only --benchmark-json out/steps/steps.json --picture out/steps/steps.png
	$(BIN)python -m bench loss --out out/loss

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: EXTRA = bench,faces
.venv/test: EXTRA = test
.venv/peers: EXTRA = bench,faces,peers
.venv/run .venv/test .venv/peers: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv .venv-floor out build *.egg-info .pytest_cache .mypy_cache .ruff_cache

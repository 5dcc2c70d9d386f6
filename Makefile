# Everything on a fresh machine that has python3 >= 3.11 and make: `make demo`, `make test`, `make check`.
UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_FIND_LINKS

BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/installed
	$(BIN)/seresvit demo --out demo

# The tests of training fork and send signals: in a process of their own, where no other library's threads run.
test: .venv/installed
	$(BIN)/pytest --ignore=tests/training
	$(BIN)/pytest tests/training

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev,export,serve]"
	touch $@

clean:
	rm -rf .venv demo

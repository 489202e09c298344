# Every target makes the virtual environment it needs, once, and again when its requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test oracle theory lint

# Erase a concept from the embedded model and show before and after.
demo: $(VENV)/core.stamp
	$(BIN)/python cpe.py demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The same numerics, compared with diffusers and transformers.
oracle: $(VENV)/oracle.stamp
	$(BIN)/python -m pytest -m "oracle and not slow"

# Run the six notebooks and keep what they print and draw.
theory: $(VENV)/theory.stamp
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False theory/*.ipynb

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/venv.stamp:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/core.stamp: requirements.txt | $(VENV)/venv.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt $(VENV)/core.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-test.txt
	touch $@

$(VENV)/oracle.stamp: requirements-oracle.txt $(VENV)/test.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-oracle.txt
	# of the first only the file of CLIP's official vocabulary is read; the second asks for a package that reports use
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps open_clip_torch==3.3.0 openvino==2026.4.1
	touch $@

$(VENV)/theory.stamp: requirements-theory.txt $(VENV)/core.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-theory.txt
	touch $@

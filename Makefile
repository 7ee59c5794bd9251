# Everything a developer runs. `make` says what there is; each target makes what it needs.

PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := -m pip --disable-pip-version-check install --progress-bar off
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')
ROLES := session domain claim relay answers refusals wakeup cli
OF_SQLALCHEMY := session session_machine domain schema inbox handlers
PYTEST = -m pytest -n $(WORKERS) --dist loadscope

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-roles test-sqlalchemy20 lint format wheel-check bench faults faults-long soak clean

help: ## what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

demo: $(READY) ## the airports of the world, live bookings, and a relay and a consumer killed on the way
	@$(BIN)/outbox-relay demo

test: $(READY) ## the whole suite, on PostgreSQL and Valkey out of wheels
	@$(BIN)/python $(PYTEST)

test-oldest: $(VENV)-sa20/.ready ## the same suite on the PostgreSQL and Redis of this machine, with SQLAlchemy 2.0 and the least rights
	@OUTBOX_TEST_SERVERS=system OUTBOX_TEST_ROLES=1 OUTBOX_TEST_KILLS=2 $(VENV)-sa20/bin/python $(PYTEST) \
		$(addprefix --ignore tests/,model acceptance/test_demo.py faults/test_soak.py integration/test_measure.py) -k "not control and not nothing[consumer-"

test-roles: $(READY) ## the tests of the write side and the relay, each as a role with the least rights
	@OUTBOX_TEST_ROLES=1 $(BIN)/python $(PYTEST) $(addprefix tests/integration/test_,$(addsuffix .py,$(ROLES)))

test-sqlalchemy20: $(VENV)-sa20/.ready ## the unit tests, and those of the session, the schema and the inbox, with SQLAlchemy 2.0
	@$(VENV)-sa20/bin/python $(PYTEST) tests/unit \
		$(addprefix tests/integration/test_,$(addsuffix .py,$(OF_SQLALCHEMY)))

lint: $(READY) ## ruff, mypy --strict, and who may import whom
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(READY) ## let ruff format and fix
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

wheel-check: $(READY) ## build the wheel, install it alone, and run it
	@echo "Building the wheel ..."
	@rm -rf dist $(VENV)-wheel && $(BIN)/python -m build --wheel --outdir dist . > /dev/null
	@echo "Installing it into an environment of its own ..."
	@$(PYTHON) -m venv $(VENV)-wheel
	@$(VENV)-wheel/bin/python $(PIP) --quiet -c constraints.txt dist/*.whl
	@cd / && $(CURDIR)/$(VENV)-wheel/bin/outbox-relay --version
	@cd / && $(CURDIR)/$(VENV)-wheel/bin/outbox-relay migrate --sql | grep -q 'CREATE TABLE public.outbox' && echo "The migrations are inside."

faults: $(READY) ## every fault against the relay and against a naive one, in twenty to forty minutes; FAULTS='--seed 1 --only NAME'
	@$(BIN)/python -m tests.faults $(FAULTS)

faults-long: $(READY) ## the same, with all the times, in hours
	@$(BIN)/python -m tests.faults --long $(FAULTS)

soak: $(READY) ## mixed faults at 300 events a second for half an hour, while nothing may grow; SOAK='--minutes 5'
	@$(BIN)/python -m tests.faults.soak $(SOAK)

bench: $(VENV)/.bench-ready ## each figure of the speed beside its goal, in fifteen to forty minutes; BENCH='--full', BENCH='--only relay'
	@$(BIN)/python bench $(BENCH)

clean: ## remove what make has made
	@rm -rf $(VENV) $(VENV)-sa20 $(VENV)-wheel dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with the venv module is needed; none was found on the PATH."; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing the package, PostgreSQL, Valkey and the tools (about 150 MB the first time) ..."
	@$(BIN)/python $(PIP) --editable '.[dev]' -c constraints.txt
	@$(BIN)/python -c 'import outbox, pytest, airportsdata'
	@touch $@

$(VENV)/.bench-ready: $(READY)
	@echo "Installing what draws the plots ..."
	@$(BIN)/python $(PIP) --quiet --editable '.[bench]' -c constraints.txt
	@touch $@

$(VENV)-sa20/.ready: pyproject.toml constraints.txt
	@echo "Making $(VENV)-sa20 with SQLAlchemy 2.0 ..."
	@$(PYTHON) -m venv $(VENV)-sa20
	@grep -v -i '^sqlalchemy==' constraints.txt > $(VENV)-sa20/constraints.txt
	@$(VENV)-sa20/bin/python $(PIP) --quiet --editable '.[dev]' 'SQLAlchemy==2.0.*' -c $(VENV)-sa20/constraints.txt
	@touch $@

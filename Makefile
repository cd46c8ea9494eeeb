# One target for each thing a person does. `make` alone lists them.

PYTHON ?= python3
INBOX ?= inbox
SHIPPED := sorter/models/catdog-resnet50/weights.safetensors
WEIGHTS ?= $(SHIPPED)
MODEL ?= mymodel
SIZE ?= 144
VENV := .venv
BIN := $(VENV)/bin
PREFIX ?= /usr/local

export CALIBRATION DATA DESTDIR INBOX MODEL PREFIX PYTHON WEIGHTS

.DEFAULT_GOAL := help
.PHONY: help sort install uninstall model bench steps test long torture check reference format lowest clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

sort: $(VENV)/.installed ## sort the photos in INBOX (default ./inbox) into INBOX/cats and INBOX/dogs
	@if [ "$$INBOX" = inbox ]; then mkdir -p inbox; echo "The inbox is $$PWD/inbox: drop photos there and run make sort again."; fi
	@$(BIN)/sorter run --once --inbox "$$INBOX" || [ $$? = 3 ] # the summary says what is in failed/ or was left

install: ## install command and service below PREFIX (default /usr/local), as root; DESTDIR for packagers
	@systemd/install install

uninstall: ## take away what install put; photos, configuration and history stay
	@systemd/install uninstall

# The command that made the shipped model. Its backbone is where a new one starts from, unless WEIGHTS names another.
model: $(VENV)/.installed-train ## fit a model folder MODEL (default ./mymodel) on the photos in DATA
	@test -n "$$DATA" || { echo "Name the dataset's folder or zip: make model DATA=cat-and-dog.zip" >&2; exit 2; }
	@$(BIN)/trainer fit --data "$$DATA" --output "$$MODEL" --weights "$$WEIGHTS" --image-size $(SIZE) --recipe head $${CALIBRATION:+--calibration "$$CALIBRATION"}

bench: $(VENV)/.installed ## measure photos a second on copies of PHOTOS, or on generated ones, beside the plain loop
	@$(BIN)/sorter bench --json --runs 5 $${PHOTOS:+--photos "$$PHOTOS"} $${COUNT:+--count "$$COUNT"} $${MODELDIR:+--model "$$MODELDIR"}

steps: $(VENV)/.installed-train ## measure what each step towards that speed brought
	@$(BIN)/python tests/benchmarks/steps.py $${PHOTOS:+--photos "$$PHOTOS"}

test: $(VENV)/.installed-dev ## run every test but the long ones
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

long: $(VENV)/.installed-dev ## run the tests that take minutes
	@$(BIN)/python -m pytest -m long

torture: $(VENV)/.installed-dev ## prove what the README says of safety: kills, errors, races, broken files
	@$(BIN)/python -m pytest -m torture

check: $(VENV)/.installed-dev ## ruff, ruff format, mypy --strict, and the arrows between the packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

reference: $(VENV)/.installed ## write config/settings.md from sorter/settings.py
	@$(BIN)/python -m sorter.cli.reference > config/settings.md

format: $(VENV)/.installed-dev ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lowest: ## run every test with the oldest dependencies that pyproject.toml allows, in .venv-lowest
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet uv
	@.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	@.venv-lowest/bin/python -m pytest

clean: ## remove the virtual environments; photos and the model stay
	@rm -rf .venv .venv-lowest

# The stamps stand for "this pyproject.toml is installed": a newer one makes them stale.
define install
	@config/environment "$(VENV)" . "$(1)" --editable
endef

$(VENV)/.installed: pyproject.toml
	$(call install)
	@touch $@

$(VENV)/.installed-train: pyproject.toml
	$(call install,train)
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: pyproject.toml
	$(call install,dev)
	@touch $(VENV)/.installed $(VENV)/.installed-train $@

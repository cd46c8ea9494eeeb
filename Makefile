# One target per task. `make` alone lists them.

PYTHON ?= python3
INBOX ?= inbox
SHIPPED := sorter/models/catdog-resnet50/weights.safetensors
WEIGHTS ?= $(SHIPPED)
MODEL ?= mymodel
SIZE ?= 144
VENV := .venv
BIN := $(VENV)/bin
PREFIX ?= /usr/local

export CALIBRATION DATA DESTDIR INBOX MODEL OTHERS PREFIX PYTHON WEIGHTS

.DEFAULT_GOAL := help
.PHONY: help sort install uninstall model bench steps test long torture check reference format lowest clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

sort: $(VENV)/.installed ## sort the photos in INBOX (default ./inbox) into INBOX/cats and INBOX/dogs
	@if [ "$$INBOX" = inbox ]; then mkdir -p inbox; echo "The inbox is $$PWD/inbox: drop photos into it and run make sort again."; fi
	@$(BIN)/sorter run --once --inbox "$$INBOX" || { code=$$?; [ $$code = 3 ] || exit $$code; } # 3: the summary lists what failed

install: ## install the commands and the service below PREFIX (default /usr/local), as root; DESTDIR for packagers
	@systemd/install install

uninstall: ## remove what install added; photos, configuration and history stay
	@systemd/install uninstall

# The command that made the shipped model. A new model starts from its backbone unless WEIGHTS names another.
model: ## train a model on the photos in DATA and write it to MODEL (default ./mymodel)
	@test -n "$$DATA" || { echo "Name the folder or zip file of the dataset: make model DATA=cat-and-dog.zip" >&2; exit 2; }
	@$(MAKE) --no-print-directory $(VENV)/.installed-train
	@$(BIN)/trainer fit --data "$$DATA" --output "$$MODEL" --weights "$$WEIGHTS" --image-size $(SIZE) --recipe head $${CALIBRATION:+--calibration "$$CALIBRATION"} $${OTHERS:+--others "$$OTHERS"}

bench: $(VENV)/.installed ## measure photos/s on copies of PHOTOS, or on generated photos, against a plain loop
	@$(BIN)/sorter bench --json --runs 5 $${PHOTOS:+--photos "$$PHOTOS"} $${COUNT:+--count "$$COUNT"} $${MODELDIR:+--model "$$MODELDIR"}

steps: $(VENV)/.installed-train ## measure what each optimisation contributes to that speed
	@$(BIN)/python tests/benchmarks/steps.py $${PHOTOS:+--photos "$$PHOTOS"}

test: $(VENV)/.installed-dev ## run the tests, except the long ones
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

long: $(VENV)/.installed-dev ## run the tests that take minutes
	@$(BIN)/python -m pytest -m "long and not torture" --numprocesses 2 --dist loadscope

torture: $(VENV)/.installed-dev ## run the long proofs of safety: kills, errors, races, broken files (EVERY=5: a fifth of the sweeps)
	@$(BIN)/python -m pytest -m torture --numprocesses 2 $${EVERY:+--every "$$EVERY"}

check: $(VENV)/.installed-dev ## ruff, ruff format, mypy --strict, and the imports between packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

reference: $(VENV)/.installed ## write config/settings.md from sorter/settings.py
	@$(BIN)/python -m sorter.cli.reference > config/settings.md

format: $(VENV)/.installed-dev ## apply ruff's fixes and format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lowest: ## run the tests with the oldest dependencies that pyproject.toml allows, in .venv-lowest
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet uv
	@.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	@.venv-lowest/bin/python -m pytest

clean: ## remove the virtual environments; photos and the model stay
	@rm -rf .venv .venv-lowest

# A stamp means that this pyproject.toml is installed; a newer one makes the stamp stale.
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

# Every target sets itself up from a bare Python 3.11 or newer, in .venv, with what was tested (constraints.txt).
# Set-up is done once and redone when setup.py, pyproject.toml or constraints.txt change.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
RUN ?= runs/demo
ARGS ?=
# Two workers; tests of one file share what they set up. tests/conftest.py says which files come first.
PYTEST := -n 2 --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
# The tests start hundreds of processes: what Python compiles is kept, whatever the environment says.
TESTS := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(PYTEST)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

EXTRAS_demo := [tensorboard]
EXTRAS_study := [study,tensorboard]
EXTRAS_emoji := [emoji,study,tensorboard]
EXTRAS_test := [docs,eval,tensorboard,test]
# Of tests only: CLIP's vocabulary, and the reference of FID. The torchvision they ask for does not load beside torch's
# CPU build, so they lie by themselves where only tests look (tests/support/references.py), and `pip check` stays clean.
REFERENCES_test := open_clip_torch torch-fidelity
EXTRAS_lint := [lint]
EXTRAS_docs := [docs]

.PHONY: help demo study study-full study-large study-emoji study-emoji-small test test-all lint format golden docs figures clean

help:
	@echo 'make demo      train on shapes for some minutes, generate images, score them (RUN=runs/demo)'
	@echo 'make study     every family on shapes at equal compute, with seeds, and a report: an hour (STUDY=runs/shapes_core)'
	@echo 'make study-full   four sizes of every family, data, skips, rates: a night or two (STUDY=...)'
	@echo 'make study-large  10M to 100M parameters, for a GPU or a TPU slice (STUDY=...)'
	@echo 'make study-emoji  families and captions on drawings of people and things: a night (STUDY=...)'
	@echo 'make study-emoji-small  two families and captions on drawings of people: a quarter of an hour (STUDY=...)'
	@echo 'make test      the tests, without the slow ones (ARGS=... goes to pytest)'
	@echo 'make test-all  the slow tests, which make test leaves out'
	@echo 'make lint      ruff, mypy, and the layers of the package (import-linter)'
	@echo 'make format    ruff, changing files'
	@echo 'make golden    rewrite the golden files in tests/golden; read their diff'
	@echo 'make docs      the documentation site, into site/; stops at a dead link'
	@echo 'make figures   write the figures of docs/backbones again'
	@echo 'make clean     remove .venv and caches; runs/ stays'

demo: .venv/.installed-demo
	$(BIN)/scaling-dit train --config=shapes --workdir=$(RUN)
	$(BIN)/scaling-dit evaluate --workdir=$(RUN)
	@echo
	@echo 'Open the grid of images named above, and generate your own:'
	@echo "  $(BIN)/scaling-dit sample --workdir=$(RUN) 'a small red circle above a large blue square'"
	@echo 'Curves and sample grids over time: $(BIN)/tensorboard --logdir=$(RUN), then open http://localhost:6006'

# Killed or stopped, the same command resumes. Two members at once on CPUs: on an accelerator, make study-full AT_ONCE=
AT_ONCE ?= --at_once=2
study-large: AT_ONCE =
study: STUDY ?= runs/shapes_core
study-full: STUDY ?= runs/shapes_full
study-large: STUDY ?= runs/shapes_large
study study-full study-large: .venv/.installed-study
	$(BIN)/scaling-dit study --config=$(subst study-,shapes_,$(patsubst study,study-core,$@)) --workdir=$(STUDY) $(AT_ONCE)
	$(BIN)/scaling-dit report $(STUDY)

study-emoji: STUDY ?= runs/emoji_core
study-emoji-small: STUDY ?= runs/emoji_small
study-emoji-small: FORM := :small
study-emoji-small: WHICH := -people
study-emoji study-emoji-small: .venv/.installed-emoji
	$(BIN)/python -m scaling_dit.data.emoji data/emoji$(WHICH) $(WHICH:-%=--%)
	$(BIN)/python -m scaling_dit.data.emoji data/emoji$(WHICH)-wrong $(WHICH:-%=--%) --wrong=0.3
	$(BIN)/scaling-dit study --config=emoji_core$(FORM) --workdir=$(STUDY) $(AT_ONCE)
	$(BIN)/scaling-dit report $(STUDY)

test: .venv/.installed-test
	$(TESTS) -m 'not slow' $(ARGS)

test-all: .venv/.installed-test
	$(TESTS) -m slow $(ARGS)

lint: .venv/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: .venv/.installed-test
	$(BIN)/python tools/update_golden.py
	$(BIN)/python -m tools.config_page
	$(BIN)/python -m tools.model_table
	$(BIN)/python -m tools.image_modes
	$(BIN)/python -m tools.tpu_states

docs: .venv/.installed-docs
	$(BIN)/mkdocs build --strict

figures: .venv/.installed-docs
	$(BIN)/python -m tools.figures

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.created:
	@{ test -n '$(PYTHON)' && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; } 2>/dev/null || { \
		echo 'make: error: Python 3.11 or newer is needed; install it, or name it: make PYTHON=/path/to/python' >&2; \
		exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

# A stamp per target, so that each installs only what it needs.
.venv/.installed-%: setup.py pyproject.toml constraints.txt | .venv/.created
	@echo 'installing scaling-dit$(EXTRAS_$*) into .venv'
	@$(PIP) -e '.$(EXTRAS_$*)'
	@$(if $(REFERENCES_$*),$(PIP) --no-deps --upgrade --target=.venv/references $(REFERENCES_$*))
	@touch $@

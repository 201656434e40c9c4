# Two commands do everything: `make lab` and `make test`. `make` alone lists the others.
.DEFAULT_GOAL := help
.PHONY: help setup lab fresh test test-portable test-browser export chapter run check times reseed assignment grade book lint bench arena readme clean
PYTHON ?=
# TORCH=cpu installs torch without CUDA (Linux); cu126, auto, ... as uv's --torch-backend takes them.
TORCH ?=
BIN := .venv/bin
# One thread per test worker: there are as many workers as cores, and results do not depend on the split.
TESTENV := TFKIT_STATIC=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# JupyterLab neither fetches news, nor looks for updates, nor asks about it: the course needs no network.
LAB_DEFAULTS := --LabApp.app_settings_dir=.ci/lab --LabApp.extension_manager=readonly --LabApp.news_url=None \
	--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup:
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash .ci/setup

lab: setup  ## set up .venv and open your own copies of the chapters in JupyterLab
	@$(BIN)/python -m tfkit.authoring lab
	@$(BIN)/jupyter lab $(LAB_DEFAULTS) $(LAB_OPTIONS) my-notebooks/00_start_here.ipynb

fresh: setup  ## start your copy of a chapter anew, keeping what you had beside it: make fresh NB=01
	@$(BIN)/python -m tfkit.authoring fresh $(NB)

test: setup  ## set up .venv, run all tests and every notebook
	@$(TESTENV) $(BIN)/python -m pytest $(PYTEST_OPTIONS)

test-portable: setup  ## run kernel tests, zoo tests and notebooks as on other processors
	@$(BIN)/python -m tfkit.authoring portable

test-browser: setup  ## drive JupyterLab in headless Chromium
	@$(BIN)/python -m pytest tests/test_browser.py tests/test_browser_lab.py -n 0 -m browser

export: setup  ## write tfkit/zoo from the notebooks
	@$(BIN)/python -m tfkit.authoring export

run: setup  ## export one notebook, run it and store its outputs: make run NB=11
	@$(BIN)/python -m tfkit.authoring run $(NB)

chapter: setup  ## lay out a new chapter: make chapter NB=18 NAME=squared_attention (TITLE="..." PART="...")
	@$(BIN)/python -m tfkit.authoring chapter $(NB) $(NAME) --title "$(TITLE)" --part "$(PART)"

check: setup  ## export, tests, house rules and notebook of one chapter, one line per finding: make check NB=11
	@$(BIN)/python -m tfkit.authoring check $(NB)

times: setup  ## measure the processor time of all chapters, or of one: make times NB=11
	@$(BIN)/python -m tfkit.authoring times $(NB)

reseed: setup  ## which claims of a chapter fail when every seed is another one: make reseed NB=03 SEEDS=5
	@$(BIN)/python -m tfkit.authoring reseed $(NB) --seeds $(or $(SEEDS),5)

assignment: setup  ## a chapter as coursework for nbgrader, with and without solutions: make assignment NB=01
	@$(BIN)/python -m tfkit.authoring assignment $(NB)

grade: setup  ## grades and feedback for a course folder: make grade FOLDER=mycourse (NB=01_attention JOBS=4 LIMIT=300)
	@$(BIN)/python -m tfkit.authoring grade "$(FOLDER)" $(NB) --jobs $(or $(JOBS),0) --limit $(or $(LIMIT),0)

book: setup  ## build the web site of all chapters in build/book, from stored outputs
	@$(BIN)/python -m tfkit.authoring book

lint: setup  ## check code and notebooks with ruff
	@$(BIN)/ruff check .

bench: setup  ## compare speed with torch.nn and transformers, as ratios; crossover lengths of all mixers
	@$(BIN)/python -m tests.bench

arena: setup  ## play all matches of chapter 17 that its table lacks, and measure the costs (an hour or two)
	@$(TESTENV) $(BIN)/python -c "from tfkit.zoo.long_range_arena import run_arena; run_arena('notebooks/results/long_range_arena.csv')"

readme: setup  ## write the generated parts of README.md
	@$(BIN)/python -m tfkit.authoring readme

clean:  ## remove .venv and everything generated that git does not keep
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} + ; find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

"""A new chapter, laid out by one command; the steps in README.md, followed to the letter in a copy."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tfkit.authoring import chapter
from tfkit.authoring.files import ROOT


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the checkout, without what only this machine has."""
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", "coursework", "*.egg-info")
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)


def rows(root: Path, name: str) -> list[dict]:
    with (root / "tfkit" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_stand_in_their_places_and_nothing_else_changes(copy):
    before = {name: (copy / "tfkit" / name).read_bytes() for name in ("chapters.csv", "papers.csv")}
    written = chapter.chapter("18", "squared_attention", copy)
    assert [path.name for path in written] == [
        "18_squared_attention.ipynb",
        "test_squared_attention.py",
        "chapters.csv",
        "papers.csv",
    ]
    for name, text in before.items():
        lines = (copy / "tfkit" / name).read_bytes().splitlines()
        new = [line for line in lines if b"18_squared_attention" in line]
        assert len(new) == 1 and [line for line in lines if line not in new] == text.splitlines()
        column = [row["chapter"] for row in rows(copy, name)]
        assert column == sorted(column) or name == "papers.csv"
    added = next(row for row in rows(copy, "chapters.csv") if row["chapter"] == "18_squared_attention")
    assert added["title"] == "Squared attention" and added["part"] == "Long sequences"
    nbformat.validate(nbformat.read(written[0], as_version=4))
    whole = written[0].read_text(encoding="utf-8") + written[1].read_text(encoding="utf-8")
    assert not re.search(r"__(NAME|TITLE|NUMBER|ROW|YEAR)__", whole)


@pytest.mark.parametrize(
    "number, name, message",
    [
        ("8", "x", "two digits, got '8'"),
        ("18", "Squared-Attention", "lower case and underscores, got 'Squared-Attention'"),
        ("11", "other", "11_linear_attention"),
        ("19", "attention", "test_attention.py and attention.py exist already"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(number, name, message):
    with pytest.raises(ValueError, match=message):
        chapter.chapter(number, name)


def make(copy: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What the Makefile does for these arguments, in the copy, with this Python in the place of set-up's."""
    recipe = subprocess.run(["make", "-n", *arguments], cwd=copy, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in recipe.splitlines() if "tfkit.authoring" in line]
    command = line.replace(".venv/bin/python", shlex.quote(sys.executable))
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    return subprocess.run(command, shell=True, cwd=copy, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_steps_in_the_readme_lead_to_a_chapter_that_keeps_the_rules(copy):
    """Laid out, its sentences replaced, and run, as README.md says; then every rule but that of the measured time."""
    steps = (copy / "README.md").read_text(encoding="utf-8").split("## Adding a chapter")[1].split("\n## ")[0]
    commands = re.findall(r"`make ((?:chapter|run|check|readme)\b[^`]*)`", steps)
    assert [command.split()[0] for command in commands] == ["chapter", "run", "check", "run", "readme"]
    laid_out = make(copy, *commands[0].split())
    assert laid_out.returncode == 0, laid_out.stdout + laid_out.stderr
    path = copy / "notebooks" / "18_squared_attention.ipynb"
    assert path.read_text(encoding="utf-8").count("eplace this: ") >= 6
    text = path.read_text(encoding="utf-8").replace("Replace this: ", "").replace("replace this: ", "")
    path.write_text(text, encoding="utf-8")
    ran = make(copy, *commands[1].split())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    chosen = [
        "tests/house",
        "tests/zoo/test_squared_attention.py",
        "-k",
        "18_squared_attention and not budget or formula",
    ]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *chosen]
    done = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30

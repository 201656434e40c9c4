"""The reader's copies: they follow the chapters, and her work is never touched."""

import json
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tfkit._copies import RECORD, copy_chapters, fingerprint
from tfkit.authoring.files import ROOT
from tfkit.authoring.lab import MINE, fresh, lab

NAME = "01_attention.ipynb"


def store(path: Path, source: str, output: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs = [new_output("stream", name="stdout", text=output)] if output else []
    nb = new_notebook(cells=[new_markdown_cell("# T"), new_code_cell(source, outputs=outputs)])
    nbformat.write(nb, path)


def source_of(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[1].source


@pytest.fixture
def course(tmp_path) -> tuple[Path, Path]:
    chapters = tmp_path / "notebooks"
    store(chapters / NAME, "one")
    store(chapters / "00_start_here.ipynb", "start")
    store(chapters / ".ipynb_checkpoints" / NAME, "a checkpoint")
    (chapters / "results").mkdir()
    (chapters / "results" / "table.csv").write_text("a,b\n", encoding="utf-8")
    return chapters, tmp_path / "mine"


def test_the_first_time_everything_is_copied(course):
    chapters, mine = course
    (line,) = copy_chapters(chapters, mine)
    assert "3 files are new" in line
    there = {path.relative_to(mine).as_posix() for path in mine.rglob("*") if path.is_file()}
    assert there == {NAME, "00_start_here.ipynb", "results/table.csv", RECORD}
    assert (mine / NAME).read_bytes() == (chapters / NAME).read_bytes()
    assert list(copy_chapters(chapters, mine)) == []


def test_an_untouched_copy_follows_its_chapter_even_when_it_was_run(course):
    chapters, mine = course
    list(copy_chapters(chapters, mine))
    store(mine / NAME, "one", output="run by the reader")
    store(chapters / NAME, "two")
    (line,) = copy_chapters(chapters, mine)
    assert "1 are refreshed" in line and source_of(mine / NAME) == "two"


def test_work_stays_and_a_changed_chapter_is_laid_beside_it_once(course):
    chapters, mine = course
    list(copy_chapters(chapters, mine))
    store(mine / NAME, "my work")
    assert list(copy_chapters(chapters, mine)) == []
    store(chapters / NAME, "two")
    (line,) = copy_chapters(chapters, mine)
    beside = mine / "01_attention.new.ipynb"
    assert line.endswith("01_attention.new.ipynb")
    assert (source_of(mine / NAME), source_of(beside)) == ("my work", "two")
    beside.unlink()
    assert list(copy_chapters(chapters, mine)) == [] and not beside.exists(), "she has seen that one"
    store(chapters / NAME, "three")
    list(copy_chapters(chapters, mine))
    assert source_of(mine / NAME) == "my work" and source_of(beside) == "three"
    store(mine / NAME, "three")  # she takes it over
    store(chapters / NAME, "four")
    list(copy_chapters(chapters, mine))
    assert source_of(mine / NAME) == "four"


def test_a_file_that_is_no_copy_counts_as_work(course):
    chapters, mine = course
    store(mine / NAME, "was here before")
    (mine / "notes.txt").write_text("hers", encoding="utf-8")
    list(copy_chapters(chapters, mine))
    assert source_of(mine / NAME) == "was here before" and (mine / "notes.txt").exists()
    (mine / RECORD).write_text("broken", encoding="utf-8")
    store(mine / "00_start_here.ipynb", "work")
    list(copy_chapters(chapters, mine))
    assert source_of(mine / "00_start_here.ipynb") == "work"


def test_a_chapter_starts_anew_and_what_was_there_is_kept(course, capsys):
    chapters, mine = course
    lab(chapters, mine)
    for work, kept in [("first try", "01_attention.old.ipynb"), ("second try", "01_attention.old2.ipynb")]:
        store(mine / NAME, work)
        fresh(["01"], chapters, mine)
        assert source_of(mine / NAME) == "one" and source_of(mine / kept) == work
        assert kept in capsys.readouterr().out
    (mine / NAME).unlink()
    fresh(["01_attention"], chapters, mine)
    assert source_of(mine / NAME) == "one"
    with pytest.raises(SystemExit, match="which chapter"):
        fresh([], chapters, mine)
    with pytest.raises(SystemExit, match="no single notebook is called '77'"):
        fresh(["77"], chapters, mine)


def test_what_is_half_written_never_replaces_a_copy(course, monkeypatch):
    chapters, mine = course
    list(copy_chapters(chapters, mine))
    store(chapters / NAME, "two")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        lab(chapters, mine)
    monkeypatch.undo()
    assert source_of(mine / NAME) == "one" and not list(mine.glob(".*.part"))
    list(copy_chapters(chapters, mine))
    assert source_of(mine / NAME) == "two"


def test_what_is_no_notebook_is_compared_byte_by_byte(tmp_path):
    first, second = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    for text in ("not json", "[]", json.dumps({"cells": [{}]})):
        first.write_text(text, encoding="utf-8")
        second.write_text(text + " ", encoding="utf-8")
        assert fingerprint(first) != fingerprint(second)


def test_the_copies_lie_where_links_lead_on_and_git_does_not_look():
    assert MINE.parent == ROOT, "links such as ../kernels/ lead on only as deep as notebooks/"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"jupyter lab .* {MINE.name}/00_start_here\.ipynb", makefile)
    ignored = subprocess.run(["git", "check-ignore", f"{MINE.name}/x.ipynb"], cwd=ROOT, capture_output=True)
    if ignored.returncode == 128:
        pytest.skip("this is no git checkout")
    assert ignored.returncode == 0


def test_readers_see_nothing_of_the_grading_tools():
    """nbgrader is installed for authors, and puts a Validate button on each notebook and tabs beside it."""
    config = pytest.importorskip("jupyterlab_server.config")
    from jupyter_core.paths import jupyter_path

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (settings,) = set(re.findall(r"app_settings_dir=(\S+)", makefile))
    page = config.get_page_config(jupyter_path("labextensions"), app_settings_dir=ROOT / settings)
    assert "@jupyter/nbgrader" in page["disabledExtensions"]

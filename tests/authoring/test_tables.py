"""The generated parts of README.md and of the guide for teachers."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tfkit import papers
from tfkit.authoring import tables
from tfkit.authoring.files import NOTEBOOKS


def write(folder, name, *cells):
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=list(cells) or [new_code_cell("x = 1")]), path)
    return path


def test_only_the_generated_part_of_a_text_is_replaced(tmp_path):
    text = tables.with_table(f"# Title\n{tables.START}\nold\n{tables.END}\nafter\n", notebooks=tmp_path)
    assert text.startswith(f"# Title\n{tables.START}\n| chapter |") and text.endswith(f"{tables.END}\nafter\n")
    assert "old" not in text and tables.with_table(text, notebooks=tmp_path) == text
    for unmarked in ("no marks here", f"{tables.END}\n{tables.START}"):
        with pytest.raises(ValueError, match="no marks"):
            tables.with_table(unmarked)


def test_the_table_has_every_chapter_and_counts_its_papers(tmp_path):
    write(tmp_path, "01_attention")
    lines = tables.table(tmp_path).splitlines()
    parts = dict.fromkeys(about["part"] for about in papers.chapters().values())
    assert len(lines) == 2 + len(papers.chapters()) + len(parts)
    assert [line for line in lines if line.startswith("| **")] == [f"| **{part}** | | |" for part in parts]
    written = next(line for line in lines if line.startswith("| 01 |"))
    mine = sum(p.chapter == "01_attention" for p in papers.papers().values())
    assert "](notebooks/01_attention.ipynb)" in written and written.endswith(f"| 0 of {mine} |")
    assert sum(line.endswith("| planned |") for line in lines) == len(papers.chapters()) - 1


def test_the_guide_names_only_chapters_that_exist_and_fits_their_needs():
    text = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    there = {path.stem[:2]: tables.facts(path) for path in NOTEBOOKS.glob("[0-9]*.ipynb")}
    rows = [line.split("|")[3] for line in text.split("## The chapters")[0].splitlines() if re.match(r"\| [A-Z]", line)]
    assert len(rows) == 3
    for row in rows:
        taken = []
        for number in re.findall(r"\b\d\d\b", row):
            assert set(there[number]["needs"]) <= set(taken), f"{number} needs {there[number]['needs']}, after {taken}"
            taken.append(number)


def test_facts_are_read_from_a_notebook(tmp_path):
    cells = [
        new_markdown_cell("# T\n\nTime: 90 minutes · needs chapters 01 and 02"),
        new_markdown_cell("### Exercise 1\n\nDifficulty 4 of 5 · 5 minutes."),
    ]
    found = tables.facts(write(tmp_path, "90_toy", *cells))
    assert found == {"minutes": 90, "needs": ["01", "02"], "difficulties": [4]}
    assert "c01 --> c90" in tables.guide(tmp_path) and "| 90 | 01, 02 | 4 |" in tables.guide(tmp_path)


def test_a_notebook_that_does_not_say_its_time_is_named(tmp_path):
    with pytest.raises(ValueError, match="90_toy.ipynb: its first cell needs a line 'Time: 60 minutes"):
        tables.facts(write(tmp_path, "90_toy", new_markdown_cell("# T")))

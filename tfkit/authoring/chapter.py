"""`make chapter NB=18 NAME=squared_attention`: a chapter that runs and passes, to be rewritten piece by piece."""

from __future__ import annotations

import csv
import datetime
import io
import re
from pathlib import Path

from tfkit.authoring.files import ROOT, write, write_notebook

TEMPLATE = Path(__file__).resolve().parent / "template"


def chapter(number: str, name: str, root: Path = ROOT, title: str = "", part: str = "") -> list[Path]:
    """Write notebook, test and rows of a new chapter; returns the paths of what was written or changed.

    The row of a paper with the chapter's own name stands for the first paper; its title and year are to be corrected.
    Raises ValueError when number or name is not usable, or is taken.
    """
    if not re.fullmatch(r"\d\d", number):
        raise ValueError(f"the number of a chapter has two digits, got {number!r}. Use: make chapter NB=18 NAME=a_name")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"the name of a chapter is a module's name, lower case and underscores, got {name!r}")
    stem, title = f"{number}_{name}", title or name.replace("_", " ").capitalize()
    notebook, test = root / "notebooks" / f"{stem}.ipynb", root / "tests" / "zoo" / f"test_{name}.py"
    chapters, papers = _read(root / "tfkit" / "chapters.csv"), _read(root / "tfkit" / "papers.csv")
    taken = [path.name for path in (root / "notebooks").glob(f"{number}_*.ipynb")]
    taken += [row["chapter"] for row in chapters if row["chapter"][:2] == number and row["chapter"] != stem]
    taken += [path.name for path in (test, root / "tfkit" / "zoo" / f"{name}.py") if path.exists()]
    if taken:
        raise ValueError(f"{stem} cannot be laid out, since {' and '.join(taken)} exist already")
    written = [notebook, test]
    if stem not in [row["chapter"] for row in chapters]:
        before = [row for row in chapters if row["chapter"] < stem]
        part = part or (before or chapters)[-1 if before else 0]["part"]
        chapters.insert(len(before), {"chapter": stem, "title": title, "part": part})
        _write(root / "tfkit" / "chapters.csv", chapters)
        written.append(root / "tfkit" / "chapters.csv")
    rows = [row for row in papers if row["chapter"] == stem]
    if not rows:
        rows = [_paper(name, title, stem)]
        place = sum(row["chapter"] < stem for row in papers)
        papers[place:place] = rows
        _write(root / "tfkit" / "papers.csv", papers)
        written.append(root / "tfkit" / "papers.csv")
    words = {"NUMBER": number, "NAME": name, "TITLE": rows[0]["title"], "YEAR": rows[0]["year"], "ROW": rows[0]["id"]}
    write_notebook(notebook, _notebook(_filled("notebook.txt", words)))
    write(test, _filled("test.txt", words))
    return written


def _filled(file: str, words: dict[str, str]) -> str:
    text = (TEMPLATE / file).read_text(encoding="utf-8")
    for key, value in words.items():
        text = text.replace(f"__{key}__", value)
    return text


def _notebook(text: str):
    import jupytext

    from tfkit.authoring.notebooks import tidied

    return tidied(jupytext.reads(text, fmt="py:percent"))


def _paper(id: str, title: str, chapter: str) -> dict[str, str]:
    link = f"https://arxiv.org/search/?searchtype=title&query={title.replace(' ', '+')}"
    year = str(datetime.date.today().year)
    row = {"id": id, "title": title, "year": year, "kind": "mechanism", "family": "attention_variants"}
    return {**row, "chapter": chapter, "builds_on": "attention", "link": link}


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator=_ending(path))
    table.writeheader()
    table.writerows(rows)
    write(path, text.getvalue())


def _ending(path: Path) -> str:
    return "\r\n" if b"\r\n" in path.read_bytes()[:4096] else "\n"

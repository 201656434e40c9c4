"""The reader's own copies of the chapters: `make lab` opens them, `make fresh NB=01` starts one anew.

JupyterLab saves into what it opens. Were that the checkout's notebooks, each update would conflict with the reader's
work; so she works in my-notebooks/, which git ignores and which lies as deep as notebooks/, so that links keep leading
where they led.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tfkit._copies import copy_chapters
from tfkit.authoring.files import NOTEBOOKS, ROOT, find

MINE = ROOT / "my-notebooks"


def lab(source: Path = NOTEBOOKS, folder: Path = MINE) -> Path:
    """Make or refresh the copies and say what was done; the notebook to open first."""
    _say(source, folder)
    return folder / "00_start_here.ipynb"


def fresh(chapters: list[str], source: Path = NOTEBOOKS, folder: Path = MINE) -> None:
    """Start chapters anew, by number or name; what the reader had is kept beside. Raises SystemExit for no chapter."""
    if not chapters:
        sys.exit("which chapter? make fresh NB=11")
    _say(source, folder, tuple(find(chapter, source).name for chapter in chapters))


def _say(source: Path, folder: Path, fresh: tuple[str, ...] = ()) -> None:
    try:
        for line in copy_chapters(source, folder, fresh):
            print(line.replace(f"{folder}:", f"{folder.name}/, your own copies of the chapters:"))
    except OSError as error:
        sys.exit(
            f"your copies of the chapters belong in {folder}, and that cannot be written ({error.strerror}). "
            "Put the course into a folder of your own, for example: cp -r . ~/tfkit && cd ~/tfkit && make lab"
        )

"""Commands for people who write chapters and give courses.

python -m tfkit.authoring export | run 11 | readme | portable | assignment 01 | book
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tfkit.authoring.files import NOTEBOOKS, ROOT, find


def chosen(chapters: list[str], command: str) -> list[Path]:
    return [find(chapter) for chapter in chapters or sys.exit(f"which chapter? make {command} NB=11")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tfkit.authoring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["export", "run", "readme", "portable", "assignment", "book"])
    parser.add_argument("chapters", nargs="*", help="chapter numbers or names; for `portable` the tests to run")
    given = parser.parse_args(arguments)
    try:
        carry_out(given.command, given.chapters)
    except OSError as error:
        sys.exit(f"{given.command} stopped, and what was stored is as it was: {error}")


def carry_out(command: str, chapters: list[str]) -> None:
    if command == "export":
        from tfkit.authoring.notebooks import export, tidy

        for path in [find(c) for c in chapters] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
            tidy(path)
            export(path)
    elif command == "run":
        from nbclient.exceptions import CellExecutionError

        from tfkit.authoring.notebooks import run

        for path in chosen(chapters, "run"):
            try:
                print(run(path))
            except CellExecutionError as error:
                sys.exit(f"{path.name} stops:\n{error}")
    elif command == "readme":
        from tfkit.authoring.tables import write_tables

        write_tables()
    elif command == "assignment":
        from tfkit.authoring.coursework import assignment

        for path in chosen(chapters, "assignment"):
            for written in assignment(path):
                print(written.relative_to(ROOT))
    elif command == "book":
        from tfkit.authoring.book import build

        print(f"open {build(ROOT / 'build' / 'book') / 'index.html'}")
    else:
        from tfkit.authoring.portable import portable

        portable(chapters)


if __name__ == "__main__":
    main()

"""Commands for people who write chapters and give courses.

export [11]            write tfkit/zoo from the notebooks
run 11                 export, execute and store a notebook
check 11               everything that concerns one chapter, one line per finding
times [11]             the processor time of chapters, into notebooks/results/times.csv
reseed 11 --seeds 5    which claims fail when every seed is another one, into notebooks/results/reseed.csv
portable [PATH]        kernel tests, zoo tests and notebooks as on other processors
readme                 the generated tables
assignment 01          a chapter as coursework
grade FOLDER           grades and feedback for what students handed in
book                   the web site
lab                    the reader's own copies of the chapters, made or refreshed
fresh 01               ... one of them started anew
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tfkit.authoring.files import NOTEBOOKS, ROOT, find


def chosen(given: argparse.Namespace) -> list[Path]:
    """The notebooks that were named; SystemExit when none was."""
    return [find(name) for name in given.names or sys.exit(f"which chapter? make {given.command} NB=11")]


def chosen_or_all(given: argparse.Namespace) -> list[Path]:
    return [find(name) for name in given.names] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def export(given) -> None:
    from tfkit.authoring import notebooks

    for path in chosen_or_all(given):
        notebooks.tidy(path)
        notebooks.export(path)


def run(given) -> None:
    from nbclient.exceptions import CellExecutionError

    from tfkit.authoring import notebooks

    for path in chosen(given):
        try:
            print(notebooks.run(path))
        except CellExecutionError as error:
            sys.exit(f"{path.name} stops:\n{error}")


def chapter(given) -> None:
    from tfkit.authoring import chapter

    if len(given.names) != 2:
        sys.exit("a chapter needs a number and a name: make chapter NB=18 NAME=squared_attention")
    for path in chapter.chapter(*given.names, title=given.title, part=given.part):
        print(path.relative_to(ROOT))


def check(given) -> None:
    from tfkit.authoring import checking

    found = 0
    for path in chosen(given):
        lines = checking.check(path)
        found += len(lines)
        print(*lines, f"{path.stem}: {len(lines) or 'no'} finding{'s' * (len(lines) != 1)}", sep="\n")
    sys.exit(bool(found))


def times(given) -> None:
    from tfkit.authoring import checking

    for path in chosen_or_all(given):
        spent = checking.measure(path)
        checking.record({path.stem: spent})
        print(path.stem, *(f"{step} {seconds:.0f} s" for step, seconds in spent.items()), flush=True)


def reseed(given) -> None:
    from tfkit.authoring import reseeding

    weak = 0
    for path in chosen(given):
        claims, stopped = reseeding.reseed(path, given.seeds)
        reseeding.record(claims)
        failing = [claim for claim in claims if claim.held < claim.seeds]
        weak += len(failing) + len(stopped)
        print(*failing, *stopped, sep="\n")
        print(f"{path.stem}: {len(claims) - len(failing)} of {len(claims)} claims hold under all {given.seeds} seeds")
    sys.exit(bool(weak))


def portable(given) -> None:
    from tfkit.authoring.portable import portable

    portable(given.names)


def readme(given) -> None:
    from tfkit.authoring import tables

    tables.write_tables()


def assignment(given) -> None:
    from tfkit.authoring import coursework

    for path in chosen(given):
        for written in coursework.assignment(path):
            print(written.relative_to(ROOT))


def grade(given) -> None:
    from tfkit.authoring import grading

    folder, *names = given.names or sys.exit("which course? make grade FOLDER=mycourse")
    for line in grading.grade_course(folder, given.jobs, given.limit, names):
        print(line, flush=True)


def book(given) -> None:
    from tfkit.authoring.book import build

    print(f"open {build(ROOT / 'build' / 'book') / 'index.html'}")


def lab(given) -> None:
    from tfkit.authoring import lab

    lab.lab()


def fresh(given) -> None:
    from tfkit.authoring import lab

    lab.fresh(given.names)


COMMANDS = {
    f.__name__: f
    for f in (chapter, export, run, check, times, reseed, portable, readme, assignment, grade, book, lab, fresh)
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tfkit.authoring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("names", nargs="*", help="chapter numbers or names; for `portable` tests; for `grade` a folder")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds `reseed` tries")
    parser.add_argument("--jobs", type=int, default=0, help="how many students `grade` runs at a time; else one a core")
    parser.add_argument("--limit", type=float, default=0, help="seconds that `grade` gives a cell; else by the chapter")
    parser.add_argument("--title", default="", help="of a new chapter; else its name")
    parser.add_argument("--part", default="", help="of the course in which a new chapter stands; else that before it")
    given = parser.parse_args(arguments)
    try:
        COMMANDS[given.command](given)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{given.command} stopped, and what was stored is as it was: {error}")


if __name__ == "__main__":
    main()

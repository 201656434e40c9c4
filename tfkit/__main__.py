"""The papers of the course in a terminal: what each one is, where it is taught, what was shown of it.

python -m tfkit linformer                    one or more papers, by id
python -m tfkit --search "linear attention"  find papers by words
python -m tfkit --coverage                   how many of the papers stand, chapter by chapter
python -m tfkit --notebooks FOLDER           copies of the chapters to work in; run it again to refresh them
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import unicodedata
from pathlib import Path

from tfkit._copies import copy_chapters
from tfkit.papers import NOTEBOOKS, chapters, collect, coverage, lookup, search


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tfkit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", nargs="*", metavar="id", help="a paper's id, for example linformer")
    parser.add_argument("--search", metavar="WORDS", help="list the papers that contain all these words")
    parser.add_argument("--coverage", action="store_true", help="count the papers that stand")
    parser.add_argument("--notebooks", metavar="FOLDER", type=Path, help="copy the chapters out, or refresh the copies")
    given = parser.parse_args(arguments)
    codecs.register_error("plainly", plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plainly")
    if not (given.ids or given.search is not None or given.coverage or given.notebooks):
        parser.print_help()
        return 2
    if given.notebooks and (code := copy_out(given.notebooks)):
        return code
    records = collect()
    try:
        for id in given.ids:
            lookup(id)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    for id in given.ids:
        print(records[id].card())
    if given.search is not None:
        found = search(given.search, records)
        for record in found:
            state = "stands" if record.stands else "not yet"
            print(f"{record.paper.id:28} {record.paper.year}  {state:8} {record.paper.title}")
        if not found:
            print(f"no paper contains all of: {given.search}", file=sys.stderr)
            return 1
    if given.coverage:
        count = coverage(records)
        for chapter, (stand, total) in count.items():
            print(f"{chapter:32} {stand:3} of {total:3}  {chapters()[chapter]['title']}")
        stand, total = (sum(pair[i] for pair in count.values()) for i in (0, 1))
        print(f"{'in all':32} {stand:3} of {total:3}")
    return 0


def plainly(error: UnicodeError) -> tuple[str, int]:
    """What a console prints for a sign that it lacks: < for \u27e8, e for \u00e9, ? where nothing is near."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    near = {"\u27e8": "<", "\u27e9": ">", "\u2013": "-", "\u2014": "-", "\u2018": "'", "\u2019": "'", "\u00d7": "x"}
    signs = error.object[error.start : error.end]
    bare = (near.get(s) or unicodedata.normalize("NFKD", s).encode("ascii", "ignore").decode() or "?" for s in signs)
    return "".join(bare), error.end


def copy_out(folder: Path) -> int:
    """Copies of all chapters in `folder`; work that stands there is never overwritten."""
    if folder.resolve() == NOTEBOOKS.resolve():
        print(f"{folder} holds the chapters themselves; name another folder for copies of them", file=sys.stderr)
        return 1
    try:
        for line in copy_chapters(NOTEBOOKS, folder):
            print(line)
    except OSError as error:
        print(f"the chapters cannot be copied to {folder}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"the chapters are in {folder}; begin with {folder / '00_start_here.ipynb'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `python -m tfkit --coverage | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""The papers of the course in a terminal: what each one is, where it is taught, what was shown of it.

python -m tfkit linformer                    one or more papers, by id
python -m tfkit --search "linear attention"  find papers by words
python -m tfkit --coverage                   how many of the papers stand, chapter by chapter
"""

from __future__ import annotations

import argparse
import os
import sys

from tfkit.papers import chapters, collect, coverage, lookup, search


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tfkit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", nargs="*", metavar="id", help="a paper's id, for example linformer")
    parser.add_argument("--search", metavar="WORDS", help="list the papers that contain all these words")
    parser.add_argument("--coverage", action="store_true", help="count the papers that stand")
    given = parser.parse_args(arguments)
    if not (given.ids or given.search is not None or given.coverage):
        parser.print_help()
        return 2
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `python -m tfkit --coverage | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Copies of the chapters for a reader to work in, which later versions refresh without ever touching her work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

RECORD = ".copied.json"  # file -> fingerprint of the chapter that was last copied for it


def fingerprint(path: Path) -> str:
    """What a reader can change of a file: of a notebook the cells, not their outputs; of another file every byte."""
    data = path.read_bytes()
    if path.suffix == ".ipynb":
        try:
            cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(data)["cells"]]
            data = json.dumps(cells).encode()
        except (ValueError, KeyError, TypeError):
            pass  # not a notebook after all: every byte counts
    return hashlib.sha256(data).hexdigest()


def copy_chapters(source: Path, folder: Path, fresh: tuple[str, ...] = ()) -> Iterator[str]:
    """Bring the files of `source` to `folder`, and say in one line for each what was done beyond a first copy.

    A copy whose cells are as they were copied follows its chapter. A copy that the reader has changed stays; when its
    chapter changes, the new one is laid beside it as NAME.new.ipynb. Files that are not copies stay as well. A file
    named in `fresh` starts anew, and what was there is kept as NAME.old.ipynb. Raises OSError as writing does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = _read(folder / RECORD)
    first = refreshed = 0
    for path in sorted(p for p in source.rglob("*") if p.is_file() and not _hidden(p.relative_to(source))):
        name = path.relative_to(source).as_posix()
        target, now = folder / name, fingerprint(path)
        if name in fresh and target.exists() and fingerprint(target) != now:
            kept = _unused(target, "old")
            target.rename(kept)
            yield f"{name} starts anew; what you had is in {kept.name}"
        if not target.exists():
            first += name not in record
            _place(path, target)
        elif (there := fingerprint(target)) == now:
            pass
        elif there == record.get(name):
            refreshed += 1
            _place(path, target)
        elif record.get(name) == now:
            continue  # hers, and its chapter is the one that she began with
        else:
            beside = target.with_name(f"{target.stem}.new{target.suffix}")
            _place(path, beside)
            yield f"{name} has changed and so has yours, which stays: the new one is {beside.name}"
        record[name] = now
    _write(folder / RECORD, json.dumps(record, indent=0, sort_keys=True))
    if first or refreshed:
        yield f"{folder}: {first} files are new, {refreshed} are refreshed"


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _unused(target: Path, word: str) -> Path:
    """NAME.old.ipynb, or NAME.old2.ipynb and so on where that is taken."""
    number = 1
    while (path := target.with_name(f"{target.stem}.{word}{number if number > 1 else ''}{target.suffix}")).exists():
        number += 1
    return path


def _place(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, path.read_bytes())


def _write(path: Path, content: str | bytes) -> None:
    """Whole or not at all: a full disk leaves what was there."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # no copies yet, or a broken record: then every file counts as the reader's own
    return found if isinstance(found, dict) else {}

"""Where things lie, and writing that never leaves half a file."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def find(number: str, notebooks: Path = NOTEBOOKS) -> Path:
    """The notebook of a chapter, by number ("11") or name. Raises SystemExit that lists what there is."""
    number = number.removesuffix(".ipynb")
    found = sorted(notebooks.glob(f"{number}_*.ipynb")) or sorted(notebooks.glob(f"{number}.ipynb"))
    if len(found) != 1:
        there = ", ".join(path.stem for path in sorted(notebooks.glob("[0-9]*.ipynb")))
        sys.exit(f"no single notebook is called {number!r}; there are: {there}. Use: make run NB=01")
    return found[0]


def write(path: Path | str, content: str | bytes) -> None:
    """Put `content` into a file, whole or not at all: on any error (a full disk, Ctrl-C) the old file stays as it was.

    The new content is written beside the file and takes its name in one step. A link stays a link; a file keeps its
    permissions. Raises OSError as `open` does.
    """
    path = Path(path).resolve()
    data = content.encode() if isinstance(content, str) else content
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def write_notebook(path: Path | str, nb) -> None:
    """Store an nbformat notebook as `write` does; the text is what nbformat.write gives."""
    import nbformat

    text = nbformat.writes(nb)
    write(path, text if text.endswith("\n") else text + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

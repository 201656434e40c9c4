"""A notebook as the source of a module, and as a file whose stored outputs are compared."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from pathlib import Path

from tfkit.authoring.files import write, write_notebook

# Notebooks are executed for storing as the tests execute them: static, without progress bars, one thread.
ENVIRONMENT = {"TFKIT_STATIC": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
KEPT = {"tags", "jupyter", "nbgrader", "reason"}  # metadata of a cell that says something; the rest is noise


def module_text(notebook: Path) -> tuple[str, str] | None:
    """The module that a notebook exports, as (path relative to the package, text); None when it exports nothing."""
    from nbdev.export import nb_export

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "tfkit"
        (package / "zoo").mkdir(parents=True)
        inside = Path(folder) / "notebooks"
        inside.mkdir()
        copy = inside / notebook.name
        copy.write_text(notebook.read_text(encoding="utf-8"), encoding="utf-8")
        here = os.getcwd()
        try:
            os.chdir(folder)  # nbdev writes the notebook's path, relative to the module, above each cell
            nb_export(copy, lib_path=package)
        finally:
            os.chdir(here)
        written = [path for path in package.rglob("*.py") if path.name != "_modidx.py"]
        if not written:
            return None
        if len(written) > 1:
            raise ValueError(f"{notebook.name} exports to {len(written)} modules; a chapter has one")
        text = re.sub(r"(?m)^# %% .*$", f"# %% notebooks/{notebook.name}", written[0].read_text(encoding="utf-8"))
        return written[0].relative_to(package).as_posix(), text


def export(notebook: Path) -> str:
    """Write the module of one notebook, where its text changed; returns its path from the root of the project."""
    found = module_text(notebook)
    if found is None:
        return ""
    root = notebook.resolve().parents[1]
    path = root / "tfkit" / found[0]
    if not path.exists() or path.read_text(encoding="utf-8") != found[1]:
        write(path, found[1])
    return path.relative_to(root).as_posix()


def tidied(nb):
    """The notebook with cell ids that depend on the cell's source alone, and no metadata that changes by machine."""
    seen: dict[str, int] = {}
    for cell in nb.cells:
        digest = hashlib.sha1(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in KEPT}
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def tidy(notebook: Path) -> None:
    """Store the notebook as `tidied` leaves it."""
    import nbformat

    write_notebook(notebook, tidied(nbformat.read(notebook, as_version=4)))


def run(notebook: Path) -> str:
    """Export a notebook, execute it and store its outputs; returns one line with its time and size.

    The stored file is replaced in one step when all has run. A failing cell (nbclient's CellExecutionError) or a full
    disk (OSError) leaves it as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    tidy(notebook)
    export(notebook)
    nb = nbformat.read(notebook, as_version=4)
    os.environ.update(ENVIRONMENT)
    started = time.perf_counter()
    NotebookClient(
        nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}}
    ).execute()
    write_notebook(notebook, tidied(nb))
    size = notebook.stat().st_size / 1024
    return f"{notebook.stem}: {time.perf_counter() - started:.1f} s, {size:.0f} KB"

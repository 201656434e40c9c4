"""Commands for people who write chapters: export a notebook to its module, run it, list the chapters.

python -m tfkit.dev export | run 11 | readme | portable | assignment 01 | book
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, ZOO = ROOT / "notebooks", ROOT / "tfkit" / "zoo"
# Notebooks are executed for storing as the tests execute them: static, without progress bars, one thread.
ENVIRONMENT = {"TFKIT_STATIC": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def find(number: str) -> Path:
    """The notebook of a chapter, by number ("11") or name. Raises SystemExit that lists what there is."""
    number = number.removesuffix(".ipynb")
    found = sorted(NOTEBOOKS.glob(f"{number}_*.ipynb")) or sorted(NOTEBOOKS.glob(f"{number}.ipynb"))
    if len(found) != 1:
        there = ", ".join(path.stem for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")))
        sys.exit(f"no single notebook is called {number!r}; there are: {there}. Use: make run NB=01")
    return found[0]


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
            sys.exit(f"{notebook.name} exports to {len(written)} modules; a chapter has one")
        text = re.sub(r"(?m)^# %% .*$", f"# %% notebooks/{notebook.name}", written[0].read_text(encoding="utf-8"))
        return written[0].relative_to(package).as_posix(), text


def export(notebook: Path) -> str:
    """Write the module of one notebook; returns its path."""
    found = module_text(notebook)
    if found is None:
        return ""
    name, text = found
    path = ROOT / "tfkit" / name
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path.relative_to(ROOT).as_posix()


def tidy(notebook: Path) -> None:
    """Cell ids that depend only on the cell's source, and no metadata that changes from machine to machine."""
    import nbformat

    nb = nbformat.read(notebook, as_version=4)
    seen: dict[str, int] = {}
    for cell in nb.cells:
        digest = hashlib.sha1(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        keep = {"tags", "jupyter", "nbgrader"}
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in keep or k == "reason"}
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nb.nbformat, nb.nbformat_minor = 4, 5
    nbformat.write(nb, notebook)


def run(notebook: Path) -> None:
    """Export a notebook, execute it in place and store its outputs. A failing cell leaves the stored file as it was."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    tidy(notebook)
    export(notebook)
    nb = nbformat.read(notebook, as_version=4)
    os.environ.update(ENVIRONMENT)
    started = time.perf_counter()
    try:
        NotebookClient(
            nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}}
        ).execute()
    except CellExecutionError as error:
        sys.exit(f"{notebook.name} stops:\n{error}")
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(nb, notebook)
    tidy(notebook)
    size = notebook.stat().st_size / 1024
    print(f"{notebook.stem}: {time.perf_counter() - started:.1f} s, {size:.0f} KB")


def table() -> str:
    """The chapters as a Markdown table, with how many papers each covers and how many stand."""
    from tfkit.papers import chapters, collect

    records, lines, part = collect(), ["| chapter | | papers done |", "| --- | --- | --- |"], ""
    for name, about in chapters().items():
        if about["part"] != part:
            part = about["part"]
            lines.append(f"| **{part}** | | |")
        mine = [r for r in records.values() if r.paper.chapter == name]
        done = sum(r.stands for r in mine)
        there = (NOTEBOOKS / f"{name}.ipynb").exists()
        title = f"[{about['title']}](notebooks/{name}.ipynb)" if there else about["title"]
        lines.append(
            f"| {name[:2]} | {title} | {f'{done} of {len(mine)}' if mine and there else '' if there else 'planned'} |"
        )
    return "\n".join(lines)


def facts(notebook: Path) -> dict:
    """What a notebook says of itself: its minutes, the chapters it needs, the difficulties of its exercises."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    minutes, needs = re.search(r"Time: (\d+) minutes · needs (.*)", text[0]).groups()
    graded = [int(n) for part in text for n in re.findall(r"Difficulty (\d) of 5", part)]
    return {"minutes": int(minutes), "needs": re.findall(r"\d\d", needs), "difficulties": graded}


def guide() -> str:
    """The chapters that exist for teachers: minutes, what each needs, its exercises; then the needs as a graph."""
    from tfkit.papers import chapters

    lines = ["| chapter | minutes | needs | exercises, by difficulty |", "| --- | --- | --- | --- |"]
    graph = ["```mermaid", "graph LR"]
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        about, number = facts(path), path.stem[:2]
        title = chapters().get(path.stem, {"title": path.stem})["title"]
        tasks = ", ".join(map(str, about["difficulties"]))
        lines.append(
            f"| [{number} {title}]({path.name}) | {about['minutes']} | {', '.join(about['needs'])} | {tasks} |"
        )
        graph += [f'  c{number}["{number} {title}"]', *(f"  c{need} --> c{number}" for need in about["needs"])]
    return "\n".join([*lines, "", *graph, "```"])


def readme_picture() -> bytes:
    """The picture of README.md: the last attention map that chapter 02 stored."""
    cells = json.loads(find("02").read_text(encoding="utf-8"))["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    maps = [o for o in outputs if "Cross-attention" in o["metadata"]["image/png"]["alt"]]
    return base64.b64decode("".join(maps[-1]["data"]["image/png"]))


def readme_text(current: str, generated=table) -> str:
    """README.md, or with `generated=guide` the guide for teachers, with its generated part brought up to date."""
    start, end = "<!-- chapters: generated by `make readme` -->", "<!-- end of chapters -->"
    before, rest = current.split(start)
    return f"{before}{start}\n{generated()}\n{end}{rest.split(end)[1]}"


def portable() -> None:
    """Run the notebooks under other instruction sets and thread counts: stored outputs must hold."""
    failed = []
    for capability in ("default", "avx2", ""):
        for threads in ("1", "2"):
            label = f"ATEN_CPU_CAPABILITY={capability or 'native'} threads={threads}"
            print(f"== {label}", flush=True)
            environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
            environment.pop("ATEN_CPU_CAPABILITY", None)
            if capability:
                environment["ATEN_CPU_CAPABILITY"] = capability
            workers = ["-n", "1"] if threads == "2" else []
            command = [sys.executable, "-m", "pytest", "notebooks", "-q", *workers]
            if subprocess.run(command, cwd=ROOT, env=environment).returncode:
                failed.append(label)
    if failed:
        sys.exit(
            "stored outputs differ under: " + "; ".join(failed) + ". Put what cannot be stable inside \u27e8 \u27e9."
        )
    print("the stored outputs hold under all settings")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tfkit.dev", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["export", "run", "readme", "portable", "assignment", "book"])
    parser.add_argument("chapters", nargs="*", help="chapter numbers or names")
    given = parser.parse_args()
    if given.command == "export":
        for path in [find(c) for c in given.chapters] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
            tidy(path)
            export(path)
    elif given.command == "run":
        for chapter in given.chapters or sys.exit("which chapter? make run NB=11"):
            run(find(chapter))
    elif given.command == "readme":
        (NOTEBOOKS / "readme.png").write_bytes(readme_picture())
        for path, generated in ((ROOT / "README.md", table), (NOTEBOOKS / "README.md", guide)):
            path.write_text(readme_text(path.read_text(encoding="utf-8"), generated), encoding="utf-8")
    elif given.command == "assignment":
        from tfkit.coursework import assignment

        for chapter in given.chapters or sys.exit("which chapter? make assignment NB=01"):
            for path in assignment(chapter):
                print(path.relative_to(ROOT))
    elif given.command == "book":
        from tfkit.book import build

        print(f"open {build(ROOT / 'build' / 'book') / 'index.html'}")
    else:
        portable()


if __name__ == "__main__":
    main()

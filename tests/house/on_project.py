"""Rules on the project: three rooms, small helpers, arrows between packages, generated texts."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.house.rules import Chapter, all_chapters, code_cell, file, house_rule, imported, notebooks, records, texts
from tfkit.authoring.tables import guide, table, with_table
from tfkit.papers import papers


@house_rule(
    "a chapter is notebooks/NN_name.ipynb, tfkit/zoo/name.py, tests/zoo/test_name.py and a row NN_name in chapters.csv",
    lambda root: (root / "tfkit/zoo/stray.py").write_text(""),
)
def three_rooms(root: Path) -> Iterator[str]:
    chapters = [Chapter(root, path) for path in notebooks(root)]
    yield from (f"{c.path.name} is not in tfkit/chapters.csv" for c in chapters if c.name not in all_chapters())
    exporting = {c.topic: c for c in chapters if c.exported}
    for path in sorted((root / "tfkit" / "zoo").glob("*.py")):
        if path.stem != "__init__" and path.stem not in exporting:
            yield f"tfkit/zoo/{path.name} has no notebook"
    for topic, chapter in exporting.items():
        if not chapter.module.exists():
            yield f"{chapter.path.name} exports, and there is no tfkit/zoo/{topic}.py; run `make export`"
        if not chapter.tests.exists():
            yield f"{chapter.path.name} exports, and there is no tests/zoo/test_{topic}.py"
    for path in sorted((root / "tests" / "zoo").glob("test_*.py")):
        if path.stem[5:] not in exporting:
            yield f"tests/zoo/{path.name} has no notebook"


def helpers(root: Path) -> list[str]:
    """The files of tfkit outside tfkit/zoo, as paths from the root."""
    found = [path.relative_to(root).as_posix() for path in sorted((root / "tfkit").rglob("*.py"))]
    return [path for path in found if not path.startswith("tfkit/zoo/")]


# Lines that each room of helpers may hold: what every chapter imports, the data, and what makes the course.
ROOMS = {"tfkit": 3200, "tfkit/data": 2200, "tfkit/authoring": 2100}


@house_rule(
    "move what only some chapters need into a chapter",
    lambda root: (root / "tfkit/large.py").write_text("x = 1\n" * 401),
)
def small_helpers(root: Path) -> Iterator[str]:
    sizes = {path: len((root / path).read_text(encoding="utf-8").splitlines()) for path in helpers(root)}
    yield from (f"{path} has {size} lines; at most 400 are allowed" for path, size in sizes.items() if size > 400)
    for room, most in ROOMS.items():
        total = sum(size for path, size in sizes.items() if path.rsplit("/", 1)[0] == room)
        if total > most:
            yield f"{room} has {total} lines; at most {most} are allowed"


@house_rule(
    "arrows run one way: kernels <- zoo, tfkit helpers <- zoo; move the code to where it may be imported",
    file("tfkit/small.py", "", "\ndef f():\n    from tfkit.zoo import attention\n"),
)
def arrows_between_packages(root: Path) -> Iterator[str]:
    for path in helpers(root):
        for name in imported(ast.parse((root / path).read_text(encoding="utf-8"))):
            if re.match(r"(tfkit\.zoo|\.+zoo|(tfkit\.)?kernels)\b", name):
                yield f"{path} imports {name}; helpers know neither chapters nor kernels"
            if re.match(r"(tfkit\.|\.+)authoring\b", name) and not path.startswith("tfkit/authoring/"):
                yield f"{path} imports {name}; only the Makefile and tests use tfkit.authoring"
    compared = {"bench.py": {"liger_kernel", "matplotlib"}}  # it compares with others' kernels and draws a figure
    for path in sorted((root / "kernels").rglob("*.py")):
        allowed = {"torch", "triton", "kernels", ""} | set(sys.stdlib_module_names) | compared.get(path.name, set())
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name.split(".")[0] not in allowed:
                yield f"kernels/{path.name} imports {name}; kernels import torch and triton alone"


def home(path: str) -> str:
    """tfkit/data/__init__.py is the module tfkit.data."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def absolute(name: str, path: str) -> str:
    """A relative import in the file at `path`, written out: .files in tfkit/authoring/book.py is in tfkit.authoring."""
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    package = path.removesuffix(".py").split("/")[:-dots]
    return ".".join([*package, *filter(None, [name.lstrip(".")])])


@house_rule(
    "move what both need into a third file that imports neither",
    lambda root: [
        (root / f"tfkit/{one}.py").write_text(f"def f():\n    from tfkit.{two} import f\n") for one, two in ("ab", "ba")
    ],
)
def no_circles(root: Path) -> Iterator[str]:
    """No two files of tfkit import each other, directly or through others; imports inside functions count."""
    paths = {home(path): path for path in helpers(root) if path != "tfkit/__init__.py"}
    arrows: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = {absolute(name, path) for name in imported(ast.parse((root / path).read_text(encoding="utf-8")))}
        arrows[module] = (names & set(paths)) - {module}
        if path.endswith("/__init__.py"):  # a package's front names its files, which import one another and not it
            arrows[module] = {name for name in arrows[module] if not name.startswith(module + ".")}
    while free := [module for module, needs in arrows.items() if not needs]:
        arrows = {module: needs - set(free) for module, needs in arrows.items() if module not in free}
    around = [module for module in arrows if any(module in needs for needs in arrows.values())]
    if around:
        yield f"these import each other: {', '.join(sorted(around))}"


@house_rule("import it inside the function that needs it", file("tfkit/__init__.py", "", "\nimport matplotlib\n"))
def light_import(root: Path) -> Iterator[str]:
    """`import tfkit` loads none of the heavy packages."""
    heavy = (
        "matplotlib",
        "pandas",
        "ipywidgets",
        "sklearn",
        "statsmodels",
        "scipy",
        "IPython",
        "transformers",
        "skimage",
        "networkx",
        "babel",
        "tokenizers",
    )
    command = (
        f"import sys; sys.path[:0] = [{str(root)!r}]; import tfkit; print(*(set({heavy!r}) & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=root
    ).stdout.split()
    yield from (f"`import tfkit` imports {name}" for name in found)


@house_rule("run `make readme`", file("README.md", "Attention by hand", "Something else"))
def readme_current(root: Path) -> Iterator[str]:
    path = root / "README.md"
    if not path.exists():
        yield "README.md is missing"
    elif (text := path.read_text(encoding="utf-8")) != with_table(text, table, root / "notebooks"):
        yield "the generated table in README.md is not current"
    teachers = root / "notebooks" / "README.md"
    if teachers.exists() and (text := teachers.read_text(encoding="utf-8")) != with_table(
        text, guide, root / "notebooks"
    ):
        yield "the generated part of notebooks/README.md is not current"


def stale_atlas(root: Path) -> None:
    table = "<table class='atlas'><tr id=\"introduction\"><td>An Introduction<td>not yet</tbody></table>"
    cell = code_cell("table", {"output_type": "execute_result", "data": {"text/html": table}, "metadata": {}})
    (root / "notebooks" / "99_atlas.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")


@house_rule("run `make run NB=99`: the atlas has stored an older state of the papers", stale_atlas)
def atlas_current(root: Path) -> Iterator[str]:
    """The table that notebook 99 has stored shows as standing exactly the papers that stand."""
    path = root / "notebooks" / "99_atlas.ipynb"
    if not path.exists():
        return
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "".join(texts(output) for cell in cells for output in cell.get("outputs", []))
    rows = re.findall(r'<tr id="(\w+)">(.*)', text)
    stored = {id for id, row in rows if not re.search(r"<td>not yet\W*($|</)", row)}
    own = {id for id, row in papers().items() if row.chapter == path.stem}  # a notebook cannot read its own new output
    stands = {id for id, record in records(root).items() if record.stands}
    stored, stands = stored - own, stands - own
    if stored != stands:
        yield f"99_atlas.ipynb differs in {len(stored ^ stands)} papers: {', '.join(sorted(stored ^ stands)[:5])}"

"""What a rule is: a function that yields problems, the sentence that says how to mend them, and a way to break it.

`chapter_rule` looks at one notebook with its module and tests, `house_rule` at the whole project. `breaks` spoils a
copy of the sample house (sample.py); the rule must then find it. The rules themselves stand in the files on_*.py.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tfkit.papers import chapters, collect, papers

ROOT = Path(__file__).resolve().parents[2]


class Chapter:
    """One notebook with its module and its test file, in the project at `root`."""

    def __init__(self, root: Path, path: Path):
        self.root, self.path = root, path
        self.name, self.topic = path.stem, path.stem[3:]
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(self.cells):
            cell["source"], cell["number"] = "".join(cell["source"]), number
        self.code = [c for c in self.cells if c["cell_type"] == "code"]
        self.prose = [c for c in self.cells if c["cell_type"] == "markdown"]
        self.exported = [c for c in self.code if re.search(r"^#\| *export\b", c["source"], re.M)]
        self.module = root / "tfkit" / "zoo" / f"{self.topic}.py"
        self.tests = root / "tests" / "zoo" / f"test_{self.topic}.py"
        self.rows = [p for p in papers().values() if p.chapter == self.name]

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The exported code."""
        return ast.parse("\n".join(runnable(c["source"]) for c in self.exported))

    def section(self, title: str) -> list[dict]:
        """The cells from the heading that contains `title` up to the next heading of any level."""
        found: list[dict] = []
        for cell in self.cells:
            heads = headings(cell)
            if found and heads:
                break
            if found or any(title.lower() in h.lower() for h in heads):
                found.append(cell)
        return found


@functools.cache
def chapter(root: Path, path: Path) -> Chapter:
    """The chapter, read once."""
    return Chapter(root, path)


def notebooks(root: Path) -> list[Path]:
    return sorted((root / "notebooks").glob("[0-9]*.ipynb"))


def runnable(source: str) -> str:
    """A code cell without IPython's magic lines."""
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source.splitlines())


def where(cell: dict) -> str:
    lines = [line for line in cell["source"].splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("#|")] or lines
    return f"cell {cell['number']} ({(lines or [''])[0].strip()[:50]!r})"


def headings(cell: dict) -> list[str]:
    if cell["cell_type"] != "markdown":
        return []
    return re.findall(r"^#{1,4} +(.+)$", re.sub(r"```.*?```", "", cell["source"], flags=re.S), re.M)


def texts(output: dict) -> str:
    """All the words in an output."""
    data = output.get("data", {})
    parts = [output.get("text", "")] + [value for mime, value in data.items() if mime.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that the code imports; `from a import b` gives a.b as well, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def all_chapters() -> list[str]:
    return list(chapters())


@functools.cache
def records(root: Path) -> dict:
    """What the notebooks of the project at `root` show of each paper; read once."""
    return collect(root / "notebooks")


CHAPTER_RULES: dict[str, tuple[Callable, str, Callable]] = {}
HOUSE_RULES: dict[str, tuple[Callable, str, Callable]] = {}


def chapter_rule(mend: str, breaks: Callable[[Path], None]):
    return lambda rule: CHAPTER_RULES.setdefault(rule.__name__, (rule, mend, breaks)) and rule


def house_rule(mend: str, breaks: Callable[[Path], None]):
    return lambda rule: HOUSE_RULES.setdefault(rule.__name__, (rule, mend, breaks)) and rule


def notebook(change: Callable[[list[dict]], object]) -> Callable[[Path], None]:
    """A way to break the sample house: change the cells of its notebook."""

    def breaks(root: Path) -> None:
        path = notebooks(root)[0]
        nb = json.loads(path.read_text(encoding="utf-8"))
        change(nb["cells"])
        path.write_text(json.dumps(nb), encoding="utf-8")

    return breaks


def file(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A way to break the sample house: replace text in a file, or append when `old` is empty."""

    def breaks(root: Path) -> None:
        text = (root / name).read_text(encoding="utf-8")
        assert old in text
        (root / name).write_text(text.replace(old, new) if old else text + new, encoding="utf-8")

    return breaks


def add(source: str, *outputs: dict, **metadata) -> Callable[[Path], None]:
    """A way to break the sample house: one more code cell, executed like the others."""
    return notebook(
        lambda cells: cells.append(
            code_cell(source, *outputs, count=1 + sum("outputs" in c for c in cells), **metadata)
        )
    )


def prints(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def replace(old: str, new: str) -> Callable[[Path], None]:
    """A way to break the sample house: replace text in the sources of its notebook."""

    def change(cells: list[dict]) -> None:
        assert any(old in c["source"] for c in cells)
        for cell in cells:
            cell["source"] = cell["source"].replace(old, new)

    return notebook(change)


def code_cell(source: str, *outputs: dict, count: int = 0, **metadata) -> dict:
    return {
        "cell_type": "code",
        "id": f"c{count}",
        "source": source,
        "outputs": list(outputs),
        "execution_count": count,
        "metadata": metadata,
    }

"""The reference of the book: every public function and class with its signature and docstring, read from the source.

Nothing is imported, so that it can be written on a machine without Triton and says what stands in the files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tfkit.authoring.files import ROOT
from tfkit.papers import chapters

HELPERS = ("tfkit", "The helpers that every chapter uses.")
ZOO = ("tfkit.zoo", "What the notebooks export: one module for each chapter.")
KERNELS = ("kernels", "GPU kernels in Triton, with the signatures of the functions that they replace.")


def pages(root: Path = ROOT, known: set[str] | None = None) -> dict[str, str]:
    """The reference as Markdown pages, by path without suffix: an index, and a page for each module.

    known are the chapters that have a page of their own to lead to; all by default.
    """
    known = set(chapters()) if known is None else known
    made, groups = {}, []
    for (package, about), modules in ((HELPERS, _helpers(root)), (ZOO, _zoo(root)), (KERNELS, _kernels(root))):
        entries = {f"{package}.{path.stem}" if path.stem != "__init__" else package: path for path in modules}
        written = {name: text for name, path in entries.items() if (text := module_page(name, path, known))}
        made |= {f"reference/{name}": text for name, text in written.items()}
        tree = "\n".join(["```{toctree}", ":maxdepth: 1", "", *written, "```"])
        groups.append(f"## {package}\n\n{about}\n\n{tree}")
    return {"reference/index": "# Reference\n\n" + "\n\n".join(groups) + "\n"} | made


def _helpers(root: Path) -> list[Path]:
    data = [path for path in (root / "tfkit" / "data").glob("*.py")]
    return sorted(path for path in [*(root / "tfkit").glob("*.py"), *data] if not path.stem.startswith("_"))


def _zoo(root: Path) -> list[Path]:
    number = {name[3:]: name for name in chapters()}
    found = [path for path in (root / "tfkit" / "zoo").glob("*.py") if not path.stem.startswith("_")]
    return sorted(found, key=lambda path: number.get(path.stem, path.stem))


def _kernels(root: Path) -> list[Path]:
    return sorted(path for path in (root / "kernels").glob("*.py") if not path.stem.startswith("_"))


def module_page(name: str, path: Path, known: set[str] = frozenset()) -> str:
    """One module: its docstring, then its public definitions in the order of the file. Empty without any."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    entries = list(definitions(tree))
    if not entries:
        return ""
    first, rest = _split(ast.get_docstring(tree))
    chapter = next((c for c in known if c[3:] == path.stem and path.parent.name == "zoo"), None)
    taught = (
        [f"Built in chapter [{chapter[:2]}, {chapters()[chapter]['title']}](../{chapter}.ipynb)."] if chapter else []
    )
    parts = [f"# {name}", first, *([_literal(rest)] if rest else []), *taught, f"```{{py:module}} {name}\n```"]
    return "\n\n".join([*parts, *(entry(node) for node in entries)]) + "\n"


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The public functions and classes of a module: those of its __all__, else those without an underscore."""
    names = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = {value.value for value in ast.walk(node.value) if isinstance(value, ast.Constant)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node.name in names if names is not None else not node.name.startswith("_"):
                if ast.get_docstring(node):
                    yield node


def entry(node: ast.FunctionDef | ast.ClassDef, kind: str = "function", fence: str = "`````") -> str:
    """A definition as a directive of Sphinx: its signature, a sentence, the rest of the docstring as it is."""
    first, rest = _split(ast.get_docstring(node))
    body = [first, *([_literal(rest)] if rest else [])]
    if isinstance(node, ast.ClassDef):
        kind, signature = "class", node.name + _constructor(node)
        public = [f for f in _methods(node) if not f.name.startswith("_")]
        shown = [f for f in public if f.name == "forward" or ast.get_docstring(f)]
        body += [entry(f, "method", fence[:-1]) for f in shown]
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = node.name + _arguments(node, bound=kind == "method") + returns
    return f"{fence}{{py:{kind}}} {signature}\n" + "\n\n".join(part for part in body if part) + f"\n{fence}"


def _constructor(node: ast.ClassDef) -> str:
    """The arguments of a class: those of its __init__, else its annotated fields; nothing where both are inherited."""
    for made in _methods(node):
        if made.name == "__init__":
            return _arguments(made, bound=True)
    fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    return f"({', '.join(fields).replace(' = ', '=')})" if fields else ""


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [item for item in node.body if isinstance(item, ast.FunctionDef)]


def _arguments(node: ast.FunctionDef, bound: bool) -> str:
    arguments, static = node.args, any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
    if bound and not static:
        where = arguments.posonlyargs or arguments.args
        del where[:1]
    return f"({ast.unparse(arguments)})"


def _split(docstring: str | None) -> tuple[str, str]:
    """The first paragraph on one line, and what follows."""
    first, _, rest = (docstring or "").partition("\n\n")
    return re.sub(r"\s+", " ", first), rest.strip("\n")


def _literal(text: str) -> str:
    return f"```text\n{text}\n```"

"""Rules on the notebook as a module: names, arrows, signatures, docstrings, rows."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.house.rules import (
    ROOT,
    Chapter,
    add,
    all_chapters,
    chapter_rule,
    file,
    imported,
    notebooks,
    records,
    replace,
    runnable,
    where,
)
from tfkit.authoring.notebooks import module_text


def spoil_default_exp(root: Path) -> None:
    replace("default_exp zoo.attention", "default_exp zoo.other")(root)


@chapter_rule(
    "begin the first code cell with `#| default_exp zoo.<name>`, where the notebook is called NN_<name>",
    spoil_default_exp,
)
def named_module(chapter: Chapter) -> Iterator[str]:
    """The first code cell names the module."""
    wanted = f"#| default_exp zoo.{chapter.topic}"
    if not chapter.code or wanted not in re.sub(r"#\| *", "#| ", chapter.code[0]["source"]).splitlines():
        if chapter.exported or chapter.name[:2] not in ("00", "98"):  # the opening and the gallery make no module
            yield f"the first code cell lacks `{wanted}`"
    for cell in chapter.code[1:]:
        if re.search(r"^#\| *default_exp", cell["source"], re.M):
            yield f"{where(cell)} names a module again"


@chapter_rule(
    "change the notebook, never the module, and run `make export`", file("tfkit/zoo/attention.py", "", "\nx = 1\n")
)
def module_in_step(chapter: Chapter) -> Iterator[str]:
    found = module_text(chapter.path)
    if found is None:
        return
    path = chapter.root / "tfkit" / found[0]
    if not path.exists():
        yield f"{found[0]} does not exist"
    elif path.read_text(encoding="utf-8") != found[1]:
        yield f"tfkit/{found[0]} differs from what {chapter.path.name} exports"


def runtime_packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.match(r"[\w-]+", line)[0].replace("scikit-learn", "sklearn") for line in project["dependencies"]}


@chapter_rule(
    "import tfkit, kernels and earlier chapters; move what is shared into the earlier one",
    add("from tfkit.zoo import linear_attention"),
)
def arrows_between_chapters(chapter: Chapter) -> Iterator[str]:
    """Imports point to helpers and to earlier chapters; exported code needs no test package."""
    numbers = {path.stem[3:]: path.stem[:2] for path in notebooks(ROOT)} | {
        name[3:]: name[:2] for name in all_chapters()
    }
    allowed = {"tfkit", "kernels"} | runtime_packages() | set(sys.stdlib_module_names)
    for cell in chapter.code:
        for name in imported(ast.parse(runnable(cell["source"]))):
            parts = name.split(".")
            if name.startswith("."):
                yield f"{where(cell)} has a relative import, which fails in a notebook"
            elif parts[:2] == ["tfkit", "zoo"] and len(parts) > 2:
                if parts[2] not in numbers:
                    yield f"{where(cell)} imports {name}, and there is no chapter of that name"
                elif numbers[parts[2]] >= chapter.name[:2]:
                    yield f"{where(cell)} imports {name}, of chapter {numbers[parts[2]]}, not an earlier one"
            elif cell in chapter.exported and parts[0] not in allowed:
                yield f"{where(cell)} exports an import of {parts[0]}, which `pip install tfkit` does not bring"


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes with their names."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node


def signatures(tree: ast.Module) -> Iterator[tuple[str, list[tuple[str, ast.expr | None, ast.expr | None]]]]:
    """What public functions, constructors and methods take: name, then (argument, annotation, default) for each."""
    for name, node in public(tree):
        functions = [(name, node, False)]
        if isinstance(node, ast.ClassDef):
            functions = [
                (f"{name}.{f.name}", f, not any(getattr(d, "id", "") == "staticmethod" for d in f.decorator_list))
                for f in node.body
                if isinstance(f, ast.FunctionDef) and (f.name == "__init__" or not f.name.startswith("_"))
            ]
            if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                yield (
                    name,
                    [(f.target.id, f.annotation, f.value) for f in node.body if isinstance(f, ast.AnnAssign)],
                )
        for label, function, bound in functions:
            a = function.args
            plain = a.posonlyargs + a.args
            defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
            pairs = [*zip(plain, defaults, strict=True)][bound:] + [*zip(a.kwonlyargs, a.kw_defaults, strict=True)]
            yield label, [(arg.arg, arg.annotation, default) for arg, default in pairs]


@chapter_rule(
    "pass parts instead of sizes and switches: Block(mixer, feedforward, norm)",
    add("#| export\ndef f(a, b, c, d, e, f, g, h, i):\n    'Nothing.'"),
)
def few_arguments(chapter: Chapter) -> Iterator[str]:
    for name, arguments in signatures(chapter.tree):
        if len(arguments) > 8:
            yield f"{name} takes {len(arguments)} arguments; at most 8 are allowed"


@chapter_rule(
    "make the variant a function or class, or pass the part that differs (attend=, norm=); `bias` may be a flag",
    add("#| export\ndef f(x, *, causal: bool = False):\n    'Nothing.'"),
)
def slots_not_flags(chapter: Chapter) -> Iterator[str]:
    for name, arguments in signatures(chapter.tree):
        for argument, annotation, default in arguments:
            flag = annotation is not None and re.search(r"\bbool\b", ast.unparse(annotation))
            if argument != "bias" and (flag or (isinstance(default, ast.Constant) and isinstance(default.value, bool))):
                yield f"{name} has the boolean argument {argument!r}"


@chapter_rule(
    "say in a docstring what it computes in one line, then the formula, shapes, what it raises, the paper",
    add("#| export\ndef f(x):\n    return x"),
)
def docstrings(chapter: Chapter) -> Iterator[str]:
    for name, node in public(chapter.tree):
        if not (ast.get_docstring(node) or "").strip():
            yield f"{name} has no docstring"


@chapter_rule('end the docstring of its mechanism with: Source: "Title of the paper", year.', replace(", 20", ", 19"))
def sources(chapter: Chapter) -> Iterator[str]:
    """Every paper of the chapter is named, with its year, in the docstring of something exported."""
    words = [
        plain(ast.get_docstring(node) or "")
        for node in ast.walk(chapter.tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    for row in chapter.rows:
        short = row.title.split(":")[0]
        cited = [
            w
            for w in words
            if f"source {plain(short)}" in w or plain(row.title) in w or (len(short.split()) > 1 and plain(short) in w)
        ]
        if not any(str(row.year) in w for w in cited):
            yield f"no docstring names {row.title!r}, {row.year}"


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def example_ids(tree: ast.Module) -> set[str]:
    """The keys of the dict literal `examples`."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(getattr(t, "id", "") == "examples" for t in targets) and isinstance(node.value, ast.Dict):
            return {k.value for k in node.value.keys if isinstance(k, ast.Constant)}
    return set()


@chapter_rule(
    "a row has a section that calls paper(id), a holds(), an entry in the dict `examples` and a test in tests/zoo",
    replace("examples = {", "examples = {} and {"),
)
def rows_done(chapter: Chapter) -> Iterator[str]:
    """Every paper of the chapter is taught, checked, built and tested."""
    shown = records(chapter.root)
    tests = chapter.tests.read_text(encoding="utf-8") if chapter.tests.exists() else ""
    examples = example_ids(chapter.tree)
    for row in chapter.rows:
        record = shown[row.id]
        missing = [] if record.taught else ["a section that calls paper(...)"]
        missing += [] if record.holds else ["a line of holds()"]
        missing += [] if row.id in examples else ["an entry in `examples`"]
        named = re.search(rf"(?<![a-z0-9]){row.id}(?![a-z0-9])", tests)
        missing += [] if named else [f"a test in tests/zoo/{chapter.tests.name}"]
        if missing:
            yield f"{row.id} lacks {', '.join(missing)}"


@functools.cache
def exports(root: Path) -> dict[str, list[str]]:
    """Public name to the zoo modules that define it, in the order of the chapters; a module without one comes first."""
    order = {path.stem[3:]: path.stem for path in notebooks(root)}
    found: dict[str, list[str]] = {}
    for path in sorted((root / "tfkit" / "zoo").glob("*.py"), key=lambda path: order.get(path.stem, "")):
        for name, _ in public(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(name, []).append(path.stem)
    return found


@chapter_rule(
    "import the earlier one where it is the same thing; where it is another thing, give it another name",
    lambda root: (root / "tfkit/zoo/first.py").write_text("def f_introduction(x):\n    return x\n"),
)
def names_once(chapter: Chapter) -> Iterator[str]:
    """A public name is defined by one module of the zoo."""
    for name, modules in exports(chapter.root).items():
        if chapter.topic in modules[1:]:
            yield f"{name} is exported by tfkit.zoo.{modules[0]} too, which comes earlier"


@chapter_rule(
    "call the demonstration's own variable otherwise: every class of the chapter that uses the import finds it instead",
    add("from math import pi\n\npi = 3"),
)
def imports_stay(chapter: Chapter) -> Iterator[str]:
    """No cell binds a name anew that a cell imports: in the notebook exported code would use the one for the other."""
    imports = set()
    for cell in chapter.code:
        for node in ast.parse(runnable(cell["source"])).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            else:
                own = isinstance(node, ast.FunctionDef | ast.ClassDef)
                inside = [node] if own or isinstance(node, ast.Expr) else ast.walk(node)
                bound = (
                    {node.name}
                    if own
                    else {n.id for n in inside if isinstance(getattr(n, "ctx", None), ast.Store) and hasattr(n, "id")}
                )
                yield from (f"{where(cell)} binds {name} anew, which is imported" for name in sorted(bound & imports))

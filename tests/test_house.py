"""The rules of the house. Each says how to mend what it found, and is itself tested on a small house that breaks it.

A rule is a function that yields problems. `chapter_rule` looks at one notebook with its module and tests, `house_rule`
at the whole project. `breaks` spoils a copy of the sample house at the end of this file; the rule must then find it.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tfkit import dev
from tfkit.papers import collect, papers

ROOT = Path(__file__).resolve().parent.parent


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


# ---------------------------------------------------------------------------------------------------------------- rules

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


# --- the notebook as a file


@chapter_rule(
    "run `make run NB=<number>`, which executes the whole notebook from the top and stores it",
    notebook(lambda cells: cells[-1].update(execution_count=7)),
)
def executed(chapter: Chapter) -> Iterator[str]:
    """Every code cell is executed, in order."""
    for expected, cell in enumerate(chapter.code, 1):
        if not cell["source"].strip():
            yield f"{where(cell)} is empty; delete it"
            return
        if cell["execution_count"] != expected:
            yield f"{where(cell)} has execution count {cell['execution_count']} where {expected} is expected"
            return


@chapter_rule(
    "mend the code, or filter the warning where it arises with a comment that says why; then `make run`",
    add("x", prints("oh", "stderr")),
)
def calm_outputs(chapter: Chapter) -> Iterator[str]:
    """No errors, nothing on the error stream, no warnings."""
    for cell in chapter.code:
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"{where(cell)} stored an error: {output['ename']}: {output['evalue'][:80]}"
            elif output.get("name") == "stderr":
                yield f"{where(cell)} wrote to stderr: {texts(output).strip()[:80]!r}"
            elif found := re.search(r"\w*Warning:.*", texts(output)):
                yield f"{where(cell)} shows a warning: {found[0][:80]!r}"


UNSTABLE = {
    "a memory address": r"\b0x[0-9a-fA-F]{5,}",
    "a display handle": r"display_id=\w+",
    "an absolute path": r"(?<![\w./:<])/(?:home|root|usr|tmp|opt|var|mnt|work\w*|Users)/|\b[A-Z]:\\\w|site-packages",
    "a version": r"(?<![\d.])\d+\.\d+\.\d+(?:\+\w+)?(?![\d.])",
}


@chapter_rule(
    "print what is stable: a shape, a rounded number, a name; then `make run`",
    add("x", prints("<object at 0x7f3a2b1c>")),
)
def stable_outputs(chapter: Chapter) -> Iterator[str]:
    """No output that differs from machine to machine."""
    for cell in chapter.code:
        for output in cell["outputs"]:
            for what, pattern in UNSTABLE.items():
                if found := re.search(pattern, texts(output)):
                    yield f"{where(cell)} prints {what}: {found[0]!r}"
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                yield f"{where(cell)} stored a live widget, which only you can see; `make run` stores its picture"


@chapter_rule(
    "show pictures with tfkit.show(fig, alt='what there is to see'); write ![what there is to see](...) in prose",
    add("x", {"output_type": "display_data", "data": {"image/png": ""}, "metadata": {}}),
)
def pictures_described(chapter: Chapter) -> Iterator[str]:
    """Every picture has an alt text, and there is at least one picture."""
    count = 0
    for cell in chapter.code:
        for output in cell["outputs"]:
            for mime in output.get("data", {}):
                if mime.startswith("image/"):
                    count += 1
                    if len(output["metadata"].get(mime, {}).get("alt", "").split()) < 3:
                        yield f"{where(cell)} shows a picture without alt text"
            if re.search(r"<img(?![^>]*\balt=.\w)", texts(output)):
                yield f"{where(cell)} shows an <img> without alt text"
    for cell in chapter.prose:
        if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=.\w)", cell["source"]):
            yield f"{where(cell)} has an image without alt text"
    if not count:
        yield "there is no picture; a chapter has at least one that carries meaning"


@chapter_rule(
    "fewer or smaller pictures (tfkit.show reduces them to 80 dpi and 256 colors), shorter printed output",
    add("x", prints("9 " * 160_000)),
)
def small_file(chapter: Chapter) -> Iterator[str]:
    if (size := chapter.path.stat().st_size / 1024) > 300:
        yield f"the notebook has {size:.0f} KB; at most 300 KB are allowed"


@chapter_rule(
    "split the cell: one concept each, shown at once; move what is not the point into an earlier cell",
    add("x = 1\n" * 46),
)
def short_cells(chapter: Chapter) -> Iterator[str]:
    """No code cell above 45 lines, nine in ten under 25 (blank lines do not count)."""
    sizes = {where(c): sum(bool(line.strip()) for line in c["source"].splitlines()) for c in chapter.code}
    yield from (f"{cell} has {size} lines; at most 45 are allowed" for cell, size in sizes.items() if size > 45)
    long = [f"{cell}: {size}" for cell, size in sizes.items() if size >= 25]
    if len(long) > len(chapter.code) / 10:
        yield f"{len(long)} of {len(chapter.code)} code cells have 25 lines or more ({'; '.join(long)}); a tenth may"


@chapter_rule("break the line after a comma or an opening bracket", add("x = '" + "long " * 20 + "'"))
def narrow_lines(chapter: Chapter) -> Iterator[str]:
    """At most 88 columns in code cells."""
    for cell in chapter.code:
        long = [str(i) for i, line in enumerate(cell["source"].splitlines(), 1) if len(line) > 88]
        if long:
            yield f"{where(cell)} has more than 88 columns in line {', '.join(long)}"


@chapter_rule(
    "say why before how: put a few sentences before the code that lacks them",
    notebook(lambda cells: cells.extend(code_cell("1 + 1", count=i) for i in range(30, 80))),
)
def more_prose_than_code(chapter: Chapter) -> Iterator[str]:
    if len(chapter.prose) < len(chapter.code):
        yield f"{len(chapter.prose)} Markdown cells for {len(chapter.code)} code cells; at least as many are wanted"


@chapter_rule(
    'add "reason": "..." to the cell\'s metadata, or better: make the output stable and drop the tag',
    add("x", tags=["nbval-ignore-output"]),
)
def reasons_for_tags(chapter: Chapter) -> Iterator[str]:
    """A cell whose output is not compared says why."""
    for cell in chapter.code:
        ignoring = {"nbval-ignore-output", "nbval-skip", "raises-exception"} & set(cell["metadata"].get("tags", []))
        if (ignoring or re.search(r"^# *NBVAL_", cell["source"], re.M)) and len(
            cell["metadata"].get("reason", "").split()
        ) < 3:
            yield f"{where(cell)} is exempt from comparison ({', '.join(ignoring) or 'NBVAL comment'}) without a reason"


# --- the notebook as a text


@chapter_rule(
    "order the headings as in other chapters; the first cell is '# Title' and a line 'Time: ... · needs chapters ...'",
    replace("What you will learn", "Overview"),
)
def sections(chapter: Chapter) -> Iterator[str]:
    """Title, time, what you will learn, setup, exercises, summary: in this order."""
    first = chapter.cells[0]
    if first["cell_type"] != "markdown" or not first["source"].startswith("# "):
        yield "the first cell is not a Markdown cell that starts with '# Title'"
    if not any(re.search(r"\bTime\b", c["source"]) for c in chapter.cells[:3] if c["cell_type"] == "markdown"):
        yield "the opening does not say how long the chapter takes ('Time')"
    heads, at = [h.lower() for c in chapter.cells for h in headings(c)], -1
    for wanted in ("what you will learn", "setup", "exercises", "summary"):
        found = [i for i, head in enumerate(heads) if wanted.rstrip("s") in head.replace("set-up", "setup") and i > at]
        if not found:
            yield f"there is no heading '{wanted.capitalize()}' " + ("after the one before it" if at >= 0 else "")
        else:
            at = found[0]


@chapter_rule("put `tfkit.set_seed(0)` into the setup cell", replace("tfkit.set_seed(0)", "pass"))
def seeded_setup(chapter: Chapter) -> Iterator[str]:
    cells = chapter.section("setup") or chapter.section("set-up")
    if not any("set_seed(0)" in c["source"] for c in cells if c["cell_type"] == "code"):
        yield "the section Setup does not call set_seed(0)"


FETCHES = (
    r"\b(?:from_pretrained|urlopen|urlretrieve|load_dataset|fetch_\w+|IFrame|requests\.get)\("
    r"|\btorch\.hub\b|download=True|url=[\"']http|(?m:^\s*(?:!|%(?:pip|conda)).*)"
)


@chapter_rule(
    "use tfkit.data, a package's own data, or a picture made in the notebook; a plain [link](https://...) is welcome",
    replace("Prose.", "![a nice picture](https://example.org/a.png)"),
)
def offline(chapter: Chapter) -> Iterator[str]:
    """Nothing is fetched, neither by running the notebook nor by looking at it."""
    for cell in chapter.cells:
        shown = cell["source"] if cell["cell_type"] == "markdown" else "\n".join(map(texts, cell["outputs"]))
        if found := re.search(
            r"!\[[^\]]*\]\(\s*<?(?:https?:)?//|<(?:img|script|iframe|link|video)\b[^>]*(?:src|href)=.?(?:https?:)?//",
            shown,
        ):
            yield f"{where(cell)} shows something remote: {found[0][:60]!r}"
        if cell["cell_type"] == "code" and (found := re.search(FETCHES, cell["source"])):
            yield f"{where(cell)} fetches or installs something: {found[0].strip()[:60]!r}"


# --- the notebook and its module


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
        if chapter.exported or chapter.name[:2] != "00":
            yield f"the first code cell lacks `{wanted}`"
    for cell in chapter.code[1:]:
        if re.search(r"^#\| *default_exp", cell["source"], re.M):
            yield f"{where(cell)} names a module again"


@chapter_rule(
    "change the notebook, never the module, and run `make export`", file("tfkit/zoo/attention.py", "", "\nx = 1\n")
)
def module_in_step(chapter: Chapter) -> Iterator[str]:
    found = dev.module_text(chapter.path)
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


@functools.cache
def all_chapters() -> list[str]:
    from tfkit.papers import chapters

    return list(chapters())


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


MASK = re.compile(r"mask|causal|allowed|visible|keep|valid|\breal\b")


def mask_name(node: ast.expr) -> str:
    """The name of a mask that is used as it is, through indexing and reshaping; "" when it is inverted or no mask."""
    if isinstance(node, ast.Subscript):
        return mask_name(node.value)
    if isinstance(node, ast.BinOp):
        return mask_name(node.left) or mask_name(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return "" if node.func.attr == "logical_not" else mask_name(node.func.value)
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name if MASK.search(name) else ""


def inverted_masks(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if attribute in ("masked_fill", "masked_fill_") and node.args and (name := mask_name(node.args[0])):
                yield f"masked_fill({name}, ...) fills where {name} is True; write masked_fill(~{name}, ...)"
            if (
                attribute == "where"
                and len(node.args) == 3
                and "inf" in ast.unparse(node.args[1])
                and (name := mask_name(node.args[0]))
            ):
                yield f"torch.where({name}, -inf, ...) blocks where {name} is True; swap its branches"
            for keyword in node.keywords:
                known = keyword.arg and keyword.arg.endswith("key_padding_mask")
                if known and not (
                    isinstance(keyword.value, ast.UnaryOp)
                    or ast.unparse(keyword.value) == "None"
                    or "logical_not" in ast.unparse(keyword.value)
                ):
                    yield f"{keyword.arg}= of torch.nn blocks where it is True; pass the inverse, {keyword.arg}=~real"
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)
        ):
            call = node.value
            method = not (isinstance(call.func.value, ast.Name) and call.func.value.id == "torch")
            shifts = [a for a in call.args[not method :] if isinstance(a, ast.Constant)] + [
                k.value for k in call.keywords if k.arg == "diagonal"
            ]
            names = [t.id for t in node.targets if isinstance(t, ast.Name) and MASK.search(t.id)]
            if call.func.attr == "triu" and names and any(isinstance(s, ast.Constant) and s.value > 0 for s in shifts):
                yield f"{names[0]} = triu(1) is True in the future; use .tril(), or name it `blocked` or `bias`"


@chapter_rule(
    "a boolean mask is True where attention is allowed, everywhere",
    add("scores = scores.masked_fill(mask[None], float('-inf'))"),
)
def one_notation_for_masks(chapter: Chapter) -> Iterator[str]:
    for cell in chapter.cells:
        sources = (
            [cell["source"]]
            if cell["cell_type"] == "code"
            else re.findall(r"```python\n(.*?)```", cell["source"], re.S)
        )
        for source in sources:
            try:
                tree = ast.parse(runnable(source))
            except SyntaxError:
                continue  # a fragment in prose
            yield from (f"{where(cell)}: {problem}" for problem in inverted_masks(tree))


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
    records = collect(chapter.root / "notebooks")
    tests = chapter.tests.read_text(encoding="utf-8") if chapter.tests.exists() else ""
    examples = example_ids(chapter.tree)
    for row in chapter.rows:
        record = records[row.id]
        missing = [] if record.taught else ["a section that calls paper(...)"]
        missing += [] if record.holds else ["a line of holds()"]
        missing += [] if row.id in examples else ["an entry in `examples`"]
        named = re.search(rf"(?<![a-z0-9]){row.id}(?![a-z0-9])", tests)
        missing += [] if named else [f"a test in tests/zoo/{chapter.tests.name}"]
        if missing:
            yield f"{row.id} lacks {', '.join(missing)}"


# --- the house


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


@house_rule(
    "move what only some chapters need into a chapter",
    lambda root: (root / "tfkit/large.py").write_text("x = 1\n" * 401),
)
def small_helpers(root: Path) -> Iterator[str]:
    sizes = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in sorted((root / "tfkit").glob("*.py"))}
    yield from (f"tfkit/{name} has {size} lines; at most 400 are allowed" for name, size in sizes.items() if size > 400)
    if sum(sizes.values()) > 2500:
        yield f"tfkit outside zoo has {sum(sizes.values())} lines; at most 2500 are allowed"


@house_rule(
    "arrows run one way: kernels <- zoo, tfkit helpers <- zoo; move the code to where it may be imported",
    file("tfkit/small.py", "", "\ndef f():\n    from tfkit.zoo import attention\n"),
)
def arrows_between_packages(root: Path) -> Iterator[str]:
    for path in sorted((root / "tfkit").glob("*.py")):
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if re.match(r"(tfkit\.zoo|\.zoo|kernels)\b", name):
                yield f"tfkit/{path.name} imports {name}; helpers know neither chapters nor kernels"
    compared = {"bench.py": {"liger_kernel", "matplotlib"}}  # it compares with others' kernels and draws a figure
    for path in sorted((root / "kernels").rglob("*.py")):
        allowed = {"torch", "triton", "kernels", ""} | set(sys.stdlib_module_names) | compared.get(path.name, set())
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name.split(".")[0] not in allowed:
                yield f"kernels/{path.name} imports {name}; kernels import torch and triton alone"


@house_rule("import it inside the function that needs it", file("tfkit/__init__.py", "", "\nimport matplotlib\n"))
def light_import(root: Path) -> Iterator[str]:
    """`import tfkit` loads none of the heavy packages."""
    heavy = ("matplotlib", "pandas", "ipywidgets", "sklearn", "statsmodels", "scipy", "IPython", "transformers")
    command = f"import sys; sys.path[:0] = [{str(root)!r}]; import tfkit; print(*(set({heavy}) & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=root
    ).stdout.split()
    yield from (f"`import tfkit` imports {name}" for name in found)


@house_rule("run `make readme`", file("README.md", "Attention by hand", "Something else"))
def readme_current(root: Path) -> Iterator[str]:
    path = root / "README.md"
    if not path.exists():
        yield "README.md is missing"
    elif (text := path.read_text(encoding="utf-8")) != dev.readme_text(text):
        yield "the generated table in README.md is not current"
    guide = root / "notebooks" / "README.md"
    if guide.exists() and (text := guide.read_text(encoding="utf-8")) != dev.readme_text(text, dev.guide):
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
    stands = {id for id, record in collect(root / "notebooks").items() if record.stands}
    stored, stands = stored - own, stands - own
    if stored != stands:
        yield f"99_atlas.ipynb differs in {len(stored ^ stands)} papers: {', '.join(sorted(stored ^ stands)[:5])}"


# ---------------------------------------------------------------------------------------------------------------- tests


def report(name: str, rules: dict, *given) -> None:
    rule, mend, _ = rules[name]
    problems = list(rule(*given))
    assert not problems, "\n  ".join([f"{name.replace('_', ' ')}: {mend}", *problems])


@pytest.mark.parametrize("name", CHAPTER_RULES)
@pytest.mark.parametrize("path", notebooks(ROOT), ids=lambda path: path.stem)
def test_chapter(path, name):
    report(name, CHAPTER_RULES, Chapter(ROOT, path))


@pytest.mark.parametrize("name", HOUSE_RULES)
def test_house(name):
    report(name, HOUSE_RULES, ROOT)


@pytest.mark.parametrize("name", [*CHAPTER_RULES, *HOUSE_RULES])
def test_rule_accepts_a_good_house(sample, name):
    if name in CHAPTER_RULES:
        report(name, CHAPTER_RULES, Chapter(sample, notebooks(sample)[0]))
    else:
        report(name, HOUSE_RULES, sample)


@pytest.mark.parametrize("name", [*CHAPTER_RULES, *HOUSE_RULES])
def test_rule_finds_what_breaks_it(sample, tmp_path, name):
    rule, _, breaks = CHAPTER_RULES.get(name) or HOUSE_RULES[name]
    house = shutil.copytree(sample, tmp_path / "house")
    breaks(house)
    assert list(rule(Chapter(house, notebooks(house)[0]) if name in CHAPTER_RULES else house)), (
        f"{name} does not see it"
    )


def test_tests_cannot_reach_the_network():
    with socket.socket() as outside, pytest.raises(OSError, match="offline"):
        outside.connect(("192.0.2.1", 80))


BAD_OUTPUTS = {
    "an error": (calm_outputs, {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}),
    "a warning": (calm_outputs, prints("UserWarning: deprecated")),
    "a path": (stable_outputs, prints("saved to /home/reader/x.pt")),
    "a version": (stable_outputs, prints("torch 2.13.0+cpu")),
    "a widget": (
        stable_outputs,
        {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}, "metadata": {}},
    ),
    "a remote image": (
        offline,
        {
            "output_type": "display_data",
            "data": {"text/html": "<img alt='a cat' src='https://example.org/c.png'>"},
            "metadata": {},
        },
    ),
    "an <img> without alt": (
        pictures_described,
        {"output_type": "display_data", "data": {"text/html": "<img src='c.png'>"}, "metadata": {}},
    ),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_output_is_found(sample, tmp_path, name):
    rule, output = BAD_OUTPUTS[name]
    house = shutil.copytree(sample, tmp_path / "house")
    add("x", output)(house)
    assert list(rule(Chapter(house, notebooks(house)[0])))


BAD_CODE = {
    "!pip install einops": offline,
    "model = AutoModel.from_pretrained('gpt2')": offline,
    "from . import attention": arrows_between_chapters,
    "import tfkit.zoo.attention": arrows_between_chapters,
    "from tfkit.zoo.nowhere import x": arrows_between_chapters,
    "#| export\nimport transformers": arrows_between_chapters,
    "#| export\nclass A:\n    'A.'\n    def __init__(self, a, b, c, d, e, f, g, *, h, i): ...": few_arguments,
    "#| export\n@dataclass\nclass A:\n    'A.'\n    causal: bool": slots_not_flags,
    "#| export\ndef f(x, causal=False):\n    'F.'": slots_not_flags,
    "scores.masked_fill_(self.causal, -1e9)": one_notation_for_masks,
    "torch.where(mask.unsqueeze(1), -torch.inf, scores)": one_notation_for_masks,
    "layer(x, src_key_padding_mask=real)": one_notation_for_masks,
    "causal = torch.ones(n, n, dtype=torch.bool).triu(1)": one_notation_for_masks,
    "mask = torch.triu(torch.ones(n, n), diagonal=1)": one_notation_for_masks,
}
GOOD_CODE = {
    "import transformers": arrows_between_chapters,
    "#| export\nimport math\nfrom kernels import norms\nimport tfkit.data": arrows_between_chapters,
    "#| export\ndef f(a, b, c, d, e, f, g, h, *args, **options):\n    'F.'": few_arguments,
    "#| export\ndef f(x, bias: bool = True, mask: Bool[Tensor, 'n m'] | None = None):\n    'F.'": slots_not_flags,
    "scores.masked_fill(~mask, -torch.inf)": one_notation_for_masks,
    "scores.masked_fill(mask.logical_not(), -torch.inf)": one_notation_for_masks,
    "torch.where(mask, scores, -torch.inf)": one_notation_for_masks,
    "layer(x, src_key_padding_mask=~real)": one_notation_for_masks,
    "causal = torch.ones(n, n, dtype=torch.bool).tril()": one_notation_for_masks,
    "mask = ~torch.ones(n, n, dtype=torch.bool).triu(1)": one_notation_for_masks,
}


@pytest.mark.parametrize("source", BAD_CODE)
def test_bad_code_is_found(sample, tmp_path, source):
    house = shutil.copytree(sample, tmp_path / "house")
    add(source)(house)
    assert list(BAD_CODE[source](Chapter(house, notebooks(house)[0])))


@pytest.mark.parametrize("source", GOOD_CODE)
def test_good_code_is_accepted(sample, tmp_path, source):
    house = shutil.copytree(sample, tmp_path / "house")
    add(source)(house)
    assert not list(GOOD_CODE[source](Chapter(house, notebooks(house)[0])))


# --------------------------------------------------------------------------------------- a small house without fault


def code_cell(source: str, *outputs: dict, count: int = 0, **metadata) -> dict:
    return {
        "cell_type": "code",
        "id": f"c{count}",
        "source": source,
        "outputs": list(outputs),
        "execution_count": count,
        "metadata": metadata,
    }


def sample_cells() -> list[dict]:
    """A chapter 01 that breaks no rule."""
    rows = [p for p in papers().values() if p.chapter == "01_attention"]
    words = ["# Attention\n\nWhat is it? Time: 5 minutes", "## What you will learn", "## Setup"]
    code: list[tuple[str, list[dict]]] = [
        ("#| default_exp zoo.attention\n#| export\nimport torch", []),
        ("import tfkit\n\ntfkit.set_seed(0)", []),
    ]
    for row in rows:
        code.append(
            (
                f"#| export\ndef f_{row.id}(x):\n"
                f'    """Itself.\n\n    Source: "{row.title}", {row.year}.\n    """\n    return x',
                [],
            )
        )
        code.append(
            (
                f"paper({row.id!r}).holds('f is the identity', True)",
                [prints(f"[{row.id}] cites: {row}\n[{row.id}] holds: f is the identity\n")],
            )
        )
    entries = "".join(f"    {r.id!r}: lambda: (f_{r.id}, (torch.ones(2),)),\n" for r in rows)
    code.append((f"#| export\nexamples = {{\n{entries}}}", []))
    picture = {
        "output_type": "display_data",
        "data": {"image/png": "", "text/plain": "Figure"},
        "metadata": {"image/png": {"alt": "a line that rises"}},
    }
    code.append(("tfkit.show(fig, alt='a line that rises')", [picture]))
    cells = [{"cell_type": "markdown", "id": f"m{i}", "source": text, "metadata": {}} for i, text in enumerate(words)]
    for count, (source, outputs) in enumerate(code, 1):
        cells.append(code_cell(source, *outputs, count=count))
        cells.append({"cell_type": "markdown", "id": f"p{count}", "source": "Prose.", "metadata": {}})
    cells += [
        {"cell_type": "markdown", "id": text, "source": f"## {text}", "metadata": {}}
        for text in ("Exercises", "Summary")
    ]
    return [*cells, code_cell("x = 1", count=len(code) + 1)]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sample") / "house"
    for folder in ("notebooks", "tfkit/zoo", "tests/zoo", "kernels"):
        (root / folder).mkdir(parents=True)
    path = root / "notebooks" / "01_attention.ipynb"
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(
        json.dumps({"cells": sample_cells(), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}),
        encoding="utf-8",
    )
    name, text = dev.module_text(path)
    (root / "tfkit" / name).write_text(text, encoding="utf-8")
    rows = " ".join(p.id for p in papers().values() if p.chapter == "01_attention")
    for name, text in {
        "tfkit/__init__.py": "",
        "tfkit/zoo/__init__.py": "",
        "tfkit/small.py": "import torch\n",
        "kernels/__init__.py": "",
        "kernels/add.py": "import torch\nimport triton\nfrom kernels import add\n",
        "tests/zoo/test_attention.py": f"# {rows}\n",
        "README.md": dev.readme_text("<!-- chapters: generated by `make readme` -->\n<!-- end of chapters -->\n"),
    }.items():
        (root / name).write_text(text, encoding="utf-8")
    return root

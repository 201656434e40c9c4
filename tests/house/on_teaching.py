"""Rules on how a chapter teaches: no walls of code, enough words, schematics, questions, exercises of every kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.house.rules import Chapter, add, chapter_rule, code_cell, notebook, notebooks, replace, where


def size(cell: dict) -> int:
    """Lines of code: neither blank ones nor directives such as `#| export`."""
    return sum(bool(line.strip()) and not line.startswith("#|") for line in cell["source"].splitlines())


def outline(chapter: Chapter) -> list[tuple[int, int, str]]:
    """Every heading as (number of its cell, level, title)."""
    found = []
    for cell in chapter.prose:
        text = re.sub(r"```.*?```", "", cell["source"], flags=re.S)
        found += [(cell["number"], len(level), title) for level, title in re.findall(r"^(#{1,4}) +(.+)$", text, re.M)]
    return found


def engineering(chapter: Chapter) -> set[int]:
    """The numbers of the cells in sections whose heading begins with "Engineering": a reader may skip them."""
    heads, cells = outline(chapter), set()
    for place, (start, level, title) in enumerate(heads):
        if title.startswith("Engineering"):
            end = next((n for n, other, _ in heads[place + 1 :] if other <= level), len(chapter.cells))
            cells |= set(range(start, end))
    return cells


@chapter_rule(
    "print or draw something in between: the value of what was just defined, a shape, a small picture; what may be "
    "skipped stands under a heading that begins with 'Engineering'",
    notebook(lambda cells: cells.extend(code_cell("y = 1", count=80 + i) for i in range(4))),
)
def walls(chapter: Chapter) -> Iterator[str]:
    """Never more than three code cells or 60 lines of code without something printed or drawn."""
    skipped, silent = engineering(chapter), []
    for cell in [*chapter.code, None]:
        if cell and cell["number"] not in skipped and not cell["outputs"]:
            silent.append(cell)
            continue
        lines = sum(map(size, silent))
        if len(silent) > 3 or lines > 60:
            yield (
                f"from {where(silent[0])} to cell {silent[-1]['number']} there are {len(silent)} code cells with "
                f"{lines} lines and nothing printed or drawn; at most 3 cells or 60 lines are allowed"
            )
        silent = []


@chapter_rule(
    "explain: what the next lines do, and why so; split what is dense, move what is not the point to 'Engineering'",
    add("x = [\n" + "    1,\n" * 43 + "]", {"output_type": "stream", "name": "stdout", "text": "1\n"}),
)
def words_per_line(chapter: Chapter) -> Iterator[str]:
    """At least six words of prose per line of code. Folded cells, formulas, code in prose and tags do not count."""
    words = 0
    for cell in chapter.prose:
        text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|`[^`\n]*`|<[^>]*>", " ", cell["source"], flags=re.S)
        words += len(re.findall(r"[^\W\d_][\w'’-]*", text))
    lines = sum(size(c) for c in chapter.code if not c["metadata"].get("jupyter", {}).get("source_hidden"))
    if words < 6 * lines:
        yield f"{words} words for {lines} lines of code are {words / lines:.1f} a line; at least 6 are wanted"


@chapter_rule(
    "split cells: one idea each, shown at once",
    notebook(lambda cells: [c.update(source=c["source"] + "\nx = 1" * 9) for c in cells if c["cell_type"] == "code"]),
)
def median_cell(chapter: Chapter) -> Iterator[str]:
    """Half of the code cells have at most 8 lines."""
    middle = median(map(size, chapter.code)) if chapter.code else 0
    if middle > 8:
        yield f"the median code cell has {middle:g} lines; about 6, at most 8, are wanted"


@chapter_rule(
    "draw the mechanism as boxes and arrows, cells or a mask: tfkit.plots.Diagram, tfkit.plots.cells, tfkit.plots.mask",
    replace("plots.Diagram()", "pass"),
)
def schematic(chapter: Chapter) -> Iterator[str]:
    """At least one schematic; plots of data do not replace it."""
    if not any(re.search(r"\bplots\.(Diagram|cells|mask)\(|\bDiagram\(", c["source"]) for c in chapter.code):
        yield "there is no schematic in the chapter"


@chapter_rule(
    "ask twice 'Before you run this: what do you expect?' in prose, with the answer in <details> in that cell",
    replace("Before you run this", "Look"),
)
def expectations(chapter: Chapter) -> Iterator[str]:
    """Two questions to the reader before something runs, each with a folded answer."""
    asked = [c for c in chapter.prose if re.search(r"before you run", c["source"], re.I) and "<details" in c["source"]]
    if len(asked) < 2:
        yield f"{len(asked)} cells ask 'Before you run this' and fold the answer; two are wanted"


def kind(title: str) -> str:
    """What an exercise asks for, from its title: "Exercise 2: predict the cost"."""
    if re.search(r"\bon paper\b", title, re.I):
        return "on paper"
    return "prediction" if re.search(r"\bpredict", title, re.I) else "code"


@chapter_rule(
    "have four exercises or more: the title of one says 'on paper', that of another 'predict', two are in code",
    replace("on paper", "in code"),
)
def exercise_kinds(chapter: Chapter) -> Iterator[str]:
    """At least four exercises: on paper, a prediction, two in code."""
    kinds = [kind(title) for _, _, title in outline(chapter) if re.match(r"Exercise \d", title)]
    if len(kinds) < 4:
        yield f"there are {len(kinds)} exercises; at least four are wanted"
    for wanted, least in {"on paper": 1, "prediction": 1, "code": 2}.items():
        if kinds.count(wanted) < least:
            yield f"{kinds.count(wanted)} exercises are of the kind '{wanted}'; at least {least} wanted"


def renamed(name: str):
    """A way to break the sample house: its chapter gets another number."""
    return lambda root: notebooks(root)[0].rename(root / "notebooks" / f"{name}.ipynb")


@chapter_rule(
    "let one exercise write a kernel: its stub or solution has a function under @triton.jit, run in the interpreter",
    renamed("70_attention"),
)
def kernel_exercise(chapter: Chapter) -> Iterator[str]:
    """In chapters 70 to 78 one exercise writes a kernel."""
    if not "70" <= chapter.name[:2] <= "78":
        return
    solutions = [c["source"] for c in chapter.prose if re.search(r"<summary>[^<]*Solution", c["source"])]
    stubs = [c["source"] for c in chapter.code if "exercise" in c["metadata"].get("tags", [])]
    if not any(re.search(r"\btriton\.jit\b|\btl\.(load|store)\b", text) for text in [*solutions, *stubs]):
        yield "no exercise writes a kernel"


def more_after_engineering(root: Path) -> None:
    notebook(
        lambda cells: cells.extend(
            {"cell_type": "markdown", "id": title, "source": f"### {title}", "metadata": {}}
            for title in ("Engineering: in one pass", "One thing more")
        )
    )(root)


@chapter_rule(
    "begin the heading of the fast form with 'Engineering', and put it last in its section", more_after_engineering
)
def engineering_last(chapter: Chapter) -> Iterator[str]:
    """The fast form comes last in its section, under a heading that begins with "Engineering"."""
    heads = outline(chapter)
    for place, (_, level, title) in enumerate(heads):
        if re.search(r"\bengineering\b|\bfast form\b", title, re.I) and not title.startswith("Engineering"):
            yield f"the heading {title!r} is of the fast form and does not begin with 'Engineering'"
        if title.startswith("Engineering") and level > 2:
            following = next((head for head in heads[place + 1 :] if head[1] <= level), None)
            if following and following[1] == level and not following[2].startswith("Engineering"):
                yield f"{following[2]!r} follows {title!r} in the same section"

"""A small house without fault."""

import json
from pathlib import Path

from tests.house.rules import code_cell, prints
from tfkit.authoring.checking import record
from tfkit.authoring.notebooks import module_text
from tfkit.authoring.tables import END, START, table, with_table
from tfkit.papers import papers

PROSE = "Prose. " + "The next lines do one thing, and these words say why. " * 2
QUESTION = "**Before you run this:** what do you expect?\n\n<details><summary>Answer</summary>It {}.</details>"
EXERCISES = ("count on paper", "predict the shape", "write the mechanism", "change it")


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
    code.append(("tfkit.show(plots.Diagram().figure, alt='a line that rises')", [picture]))
    cells = [{"cell_type": "markdown", "id": f"m{i}", "source": text, "metadata": {}} for i, text in enumerate(words)]
    for count, (source, outputs) in enumerate(code, 1):
        cells.append(code_cell(source, *outputs, count=count))
        cells.append({"cell_type": "markdown", "id": f"p{count}", "source": PROSE, "metadata": {}})
    last = [QUESTION.format("rises"), QUESTION.format("falls"), "## Exercises"]
    last += [f"### Exercise {number}: {title}\n\nDo it." for number, title in enumerate(EXERCISES, 1)]
    cells += [
        {"cell_type": "markdown", "id": f"e{place}", "source": text, "metadata": {}}
        for place, text in enumerate([*last, "## Summary"])
    ]
    return [*cells, code_cell("x = 1", count=len(code) + 1)]


def build(root: Path) -> Path:
    """Write the sample house into the folder `root`; returns it."""
    for folder in ("notebooks", "tfkit/zoo", "tests/zoo", "kernels"):
        (root / folder).mkdir(parents=True)
    path = root / "notebooks" / "01_attention.ipynb"
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(
        json.dumps({"cells": sample_cells(), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}),
        encoding="utf-8",
    )
    name, text = module_text(path)
    (root / "tfkit" / name).write_text(text, encoding="utf-8")
    rows = " ".join(p.id for p in papers().values() if p.chapter == "01_attention")
    for name, text in {
        "tfkit/__init__.py": "",
        "tfkit/zoo/__init__.py": "",
        "tfkit/small.py": "import torch\n",
        "kernels/__init__.py": "",
        "kernels/add.py": "import torch\nimport triton\nfrom kernels import add\n",
        "tests/zoo/test_attention.py": f"# {rows}\n",
        "README.md": with_table(f"{START}\n{END}\n", table, root / "notebooks"),
    }.items():
        (root / name).write_text(text, encoding="utf-8")
    record({path.stem: {"notebook": 20, "tests": 9}}, root)
    return root

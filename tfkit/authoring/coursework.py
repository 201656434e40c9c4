"""A chapter as coursework in nbgrader's format: one version for the instructor, one for the students.

`make assignment NB=01` writes both, as nbgrader's course folder has them:

    coursework/source/01_attention/01_attention.ipynb     solutions and hidden tests, between nbgrader's marks
    coursework/release/01_attention/01_attention.ipynb    neither; what students get

The exercises of the chapter become graded cells: the stub is where the answer goes, its check becomes a locked test
worth as many points as the exercise is difficult (1 to 5).
"""

from __future__ import annotations

import ast
import copy
import re
import textwrap
from pathlib import Path

from tfkit.authoring.files import ROOT, write_notebook

VERSION = 3  # of nbgrader's cell metadata
DIFFICULTY = re.compile(r"difficulty\W{0,12}([1-5])\b", re.I)


def grade_cell(name: str, points: int | None = None) -> dict:
    """nbgrader's metadata of a code cell: an answer without points, a locked test with them."""
    test = points is not None
    cell = {"schema_version": VERSION, "cell_type": "code", "grade_id": name, "task": False}
    return cell | {"grade": test, "solution": not test, "locked": test} | ({"points": points} if test else {})


def answered(stub: str, solution: str) -> str:
    """The stub with the solution in the place of `raise NotImplementedError`, between nbgrader's marks.

    What the solution has besides that function (a helper, an import) stands above it, between marks of its own.
    Raises ValueError when the stub is not one function that raises, or the solution does not define it.
    """
    functions = [node for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef)]
    raising = re.findall(r"^( +)raise NotImplementedError.*$", stub, re.M)
    if len(functions) != 1 or len(raising) != 1:
        raise ValueError(f"an exercise is one function that raises NotImplementedError once, not:\n{stub}")
    lines, name = solution.splitlines(), functions[0].name
    extra, body = [], None
    for node in ast.parse(solution).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            rest = node.body[1:] if ast.get_docstring(node) else node.body
            body = textwrap.dedent("\n".join(lines[rest[0].lineno - 1 : node.end_lineno]))
        else:
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            extra.append("\n".join(lines[start - 1 : node.end_lineno]))
    if body is None:
        raise ValueError(f"the solution does not define {name}")
    marked = f"### BEGIN SOLUTION\n{body}\n### END SOLUTION"
    above = "### BEGIN SOLUTION\n" + "\n\n\n".join(extra) + "\n### END SOLUTION\n\n\n" if extra else ""
    return above + re.sub(
        r"^( +)raise NotImplementedError.*$", lambda m: textwrap.indent(marked, m[1]), stub, count=1, flags=re.M
    )


def graded(check: str, name: str) -> str:
    """The check as a test that nbgrader can grade: it raises what it would print, and is hidden from students."""
    lines = check.splitlines()
    call = next(
        node
        for node in reversed(ast.parse(check).body)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func)[-5:] == "check"
    )
    first = call.lineno - 1
    lines[first] = "_result = " + lines[first]
    lines.insert(call.end_lineno, "assert _result, _result.message")
    cases = [
        node.args[0].value
        for node in ast.walk(call)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)[-4:] == "Case"
        and isinstance(node.args[0], ast.Constant)
    ]
    visible = [
        f"# Hidden tests compare {name} with a reference on random inputs" + (":" if cases else "."),
        *(f"# - {case}" for case in cases),
        f'assert tfkit.exercises.attempted({name}), "{name} is not attempted yet"',
    ]
    return "\n".join([*visible, "### BEGIN HIDDEN TESTS", *lines, "### END HIDDEN TESTS"])


def instructor(notebook):
    """The instructor's version of a chapter (an nbformat notebook): a new notebook, the given one stays as it is."""
    nb = copy.deepcopy(notebook)
    cells, task, number, name = [], "", 0, ""
    for index, cell in enumerate(nb.cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown" and re.search(r"<summary>[^<]*Solution", cell.source):
            continue
        if "exercise" in tags:
            number += 1
            name = re.search(r"^def (\w+)", cell.source, re.M)[1]
            told = next(c.source for c in nb.cells[index:] if c.cell_type == "markdown" and "Solution" in c.source)
            cell.source = answered(cell.source, "\n".join(re.findall(r"```python\n(.*?)```", told, re.S)))
            cell.metadata["nbgrader"] = grade_cell(f"exercise-{number}-{name}")
            cell.update(outputs=[], execution_count=None)
        elif "check" in tags:
            difficulty = DIFFICULTY.search(task)
            cell.source = graded(cell.source, name)
            cell.metadata["nbgrader"] = grade_cell(f"test-{number}-{name}", int(difficulty[1]) if difficulty else 1)
            cell.metadata.pop("jupyter", None)
            cell.update(outputs=[], execution_count=None)
        elif cell.cell_type == "markdown":
            task = cell.source
        cells.append(cell)
    if not number:
        raise ValueError("this chapter has no exercises, so there is nothing to hand out")
    nb.cells = cells
    return nb


def student(notebook):
    """The students' version of an instructor's notebook, made by nbgrader itself."""
    from nbgrader.preprocessors import CheckCellMetadata, ClearHiddenTests, ClearSolutions, ComputeChecksums, LockCells

    nb, resources = copy.deepcopy(notebook), {"nbgrader": {}}
    for step in (LockCells, ClearSolutions, ClearHiddenTests, ComputeChecksums, CheckCellMetadata):
        nb, resources = step().preprocess(nb, resources)
    return nb


def assignment(notebook: Path, folder: Path | str = ROOT / "coursework") -> tuple[Path, Path]:
    """Write both versions of a chapter's notebook; returns their paths, instructor's first."""
    import nbformat

    full = instructor(nbformat.read(notebook, as_version=4))
    written = []
    for kind, nb in (("source", full), ("release", student(full))):
        target = Path(folder) / kind / notebook.stem / notebook.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_notebook(target, nb)
        written.append(target)
    return written[0], written[1]

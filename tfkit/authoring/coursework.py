"""A chapter as coursework in nbgrader's format: one version for the instructor, one for the students.

`make assignment NB=01` writes both, as nbgrader's course folder has them:

    coursework/source/01_attention/01_attention.ipynb     solutions and hidden tests, between nbgrader's marks
    coursework/release/01_attention/01_attention.ipynb    neither; what students get

The exercises of the chapter become graded cells: the stub is where the answer goes, its check becomes a locked test
worth as many points as the exercise is difficult (1 to 5).
"""

from __future__ import annotations

import ast
import base64
import copy
import re
import secrets
import textwrap
import zlib
from pathlib import Path

from tfkit import exercises
from tfkit.authoring.files import ROOT, write_notebook

HIDDEN = Path(__file__).resolve().parent / "template" / "hidden.txt"
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


def graded(check: str, name: str, imports: str) -> str:
    """The check as a test that nbgrader can grade: it raises what it would print, and is hidden from students.

    What it compares with and by travels inside it (template/hidden.txt), so that nothing a student binds anew, in this
    notebook or in tfkit, changes the verdict. Its seeds are drawn when the assignment is made, and students never see
    them. `imports` are the statements that bind the names which the check uses.
    """
    calls = [node for node in ast.walk(ast.parse(check)) if isinstance(node, ast.Call)]
    cases = [
        node.args[0].value
        for node in calls
        if ast.unparse(node.func)[-4:] == "Case" and isinstance(node.args[0], ast.Constant)
    ]
    if sum(ast.unparse(node.func) in ("check", "tfkit.check", "exercises.check") for node in calls) != 1:
        raise ValueError(f"the check of {name} should call tfkit.check once:\n{check}")
    visible = [
        f"# Hidden tests compare {name} with a reference on random inputs" + (":" if cases else "."),
        *(f"# - {case}" for case in cases),
        f'assert tfkit.exercises.attempted({name}), "{name} is not attempted yet"',
    ]
    hidden = HIDDEN.read_text(encoding="utf-8")
    packed = lambda text: base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    words = {
        "CHECK": packed(Path(exercises.__file__).read_text(encoding="utf-8")),
        "CELL": packed(check),
        "IMPORTS": repr(imports),
        "SEEDS": repr(tuple(secrets.randbelow(2**31) for _ in range(3))),
        "NAME": name,
    }
    for key, value in words.items():
        hidden = hidden.replace(f"__{key}__", value)
    return "\n".join([*visible, "### BEGIN HIDDEN TESTS", hidden, "### END HIDDEN TESTS"])


def imports_of(notebook) -> str:
    """Every import of a notebook's cells, and the names of the module that it exports, as statements."""
    found, module = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = ["" if re.match(r"\s*[%!]", line) else line for line in cell.source.splitlines()]
            nodes = ast.parse("\n".join(lines)).body
            found += [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
            named = re.search(r"^#\| *default_exp +(\S+)", cell.source, re.M)
            module = named[1] if named else module
    exported = any(re.search(r"^#\| *export\b", c.source, re.M) for c in notebook.cells if c.cell_type == "code")
    found += [f"from tfkit.{module} import *"] * bool(module and exported)
    return "\n".join(dict.fromkeys(found))


def instructor(notebook):
    """The instructor's version of a chapter (an nbformat notebook): a new notebook, the given one stays as it is.

    Raises ValueError that names the exercise when one has no difficulty, no check, no solution, or the name of another.
    """
    nb = copy.deepcopy(notebook)
    cells, task, number, name, names, imports = [], "", 0, "", set(), imports_of(notebook)
    for index, cell in enumerate(nb.cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown" and re.search(r"<summary>[^<]*Solution", cell.source):
            continue
        if "exercise" in tags:
            number += 1
            defined = re.search(r"^def (\w+)", cell.source, re.M)
            if not defined:
                raise ValueError(f"exercise {number} defines no function:\n{cell.source}")
            name = defined[1]
            if name in names:
                raise ValueError(f"two exercises ask for {name}; nbgrader tells them apart by name, so rename one")
            names.add(name)
            cell.source = answered(cell.source, solution_of(nb.cells[index + 1 :], name))
            cell.metadata["nbgrader"] = grade_cell(f"exercise-{number}-{name}")
            cell.update(outputs=[], execution_count=None)
        elif "check" in tags:
            difficulty = DIFFICULTY.search(task)
            if not difficulty:
                raise ValueError(
                    f"{name} is worth as many points as it is difficult: write 'Difficulty 2 of 5' above it"
                )
            cell.source = graded(cell.source, name, imports)
            cell.metadata["nbgrader"] = grade_cell(f"test-{number}-{name}", int(difficulty[1]))
            cell.metadata.pop("jupyter", None)
            cell.update(outputs=[], execution_count=None)
        elif cell.cell_type == "markdown":
            task = cell.source
        cells.append(cell)
    if not number:
        raise ValueError("this chapter has no exercises, so there is nothing to hand out")
    tests = sum(cell.metadata.get("nbgrader", {}).get("grade", False) for cell in cells)
    if tests != number:
        raise ValueError(f"there are {number} exercises and {tests} checks; each exercise has one cell tagged `check`")
    nb.cells = cells
    return nb


def solution_of(cells: list, name: str) -> str:
    """The code of the first folded solution in these cells, which ends where the next exercise begins."""
    for cell in cells:
        if "exercise" in cell.metadata.get("tags", []):
            break
        if cell.cell_type == "markdown" and re.search(r"<summary>[^<]*Solution", cell.source):
            return "\n".join(re.findall(r"```python\n(.*?)```", cell.source, re.S))
    raise ValueError(
        f"{name} has no solution: write <details><summary>Solution</summary> with a ```python block below it"
    )


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

"""A chapter as coursework in nbgrader's format: one version for the instructor, one for the students.

`make assignment NB=01` writes both, as nbgrader's course folder has them, and the solutions on a sheet of their own:

    coursework/source/01_attention/01_attention.ipynb     solutions and hidden tests, between nbgrader's marks
    coursework/release/01_attention/01_attention.ipynb    neither; what students get
    coursework/key/01_attention.md                        the answer key

The exercises of the chapter become graded cells: the stub is where the answer goes, its check becomes a locked test
worth as many points as the exercise is difficult (1 to 5).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import io
import re
import secrets
import textwrap
import zlib
from pathlib import Path

import torch

import tfkit
from tfkit import exercises
from tfkit.authoring.files import ROOT, write, write_notebook

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


def asked(check: str, name: str, imports: str) -> tuple:
    """What the check of an exercise compares with: (reference, cases, options), run apart from every answer.

    `imports` are the statements that bind the names which the check uses.
    """
    calls: list[tuple] = []

    class Course:
        """tfkit, with a `check` that keeps what it is given."""

        check = staticmethod(lambda *given, **options: calls.append((*given[1:], options)))
        __getattr__ = lambda self, name: getattr(tfkit, name)

    place: dict = {"__name__": "__main__"}
    exec(imports, place)
    place.update(tfkit=Course(), check=Course.check)
    place[name] = None
    exec(check, place)
    ((reference, cases, options),) = calls
    return reference, cases, options


def proven(stub: str, solution: str, check: str, name: str, imports: str) -> tuple:
    """`asked`, of an exercise whose solution passes, whose stub is open, and whose foreseen mistakes fail.

    Raises ValueError that says which of them does not.
    """
    reference, cases, options = asked(check, name, imports)

    def verdict(source: str) -> exercises.Result:
        place: dict = {"__name__": "__main__"}
        exec(f"{imports}\n{source}", place)
        return exercises.judge(place[name], reference, cases, **options)

    with contextlib.redirect_stdout(io.StringIO()):
        solved, untouched = verdict(solution), verdict(stub)
        judged = lambda function: exercises.judge(function, reference, cases, **options)
        wrong = {text: judged(function) for text, function in options.get("mistakes", {}).items()}
    if not solved:
        raise ValueError(f"the solution of {name} does not pass its own check: {solved.message}")
    if untouched.status != "open":
        raise ValueError(f"the stub of {name} should count as not attempted: {untouched.message}")
    for text, result in wrong.items():
        if result:
            raise ValueError(f"a wrong answer to {name} passes its check, the one that is told: {text}")
    return reference, cases, options


def example(reference, cases: list, options: dict) -> str:
    """One input and the right value as text for `tfkit.exercises.sample`; "" where they are not plain or too long."""
    given = lambda: cases[0].make(torch.Generator().manual_seed(torch.iinfo(torch.int32).max))
    file = io.BytesIO()
    try:
        torch.save((given(), exercises._run(reference, given()), options.get("atol", 1e-5)), file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception:  # functions and modules do not travel as plain values
        return ""
    text = packed(file.getvalue())
    return text if len(text) <= 8000 else ""


def packed(data: str | bytes) -> str:
    return base64.b64encode(zlib.compress(data.encode() if isinstance(data, str) else data, 9)).decode()


def unpacked(text: str) -> str:
    return zlib.decompress(base64.b64decode(text)).decode()


def hidden_in(test: str) -> tuple[str, str]:
    """Check and imports out of a test cell that `graded` made. Raises ValueError when there are none."""
    found = re.search(r"^    given = (\(.*\))$", test, re.M)
    if not found:
        raise ValueError("a test holds no check; make the assignment again with this version: make assignment NB=...")
    check, imports = ast.literal_eval(found[1])
    return unpacked(check), imports


def graded(check: str, name: str, imports: str, shown: str = "") -> str:
    """The check as a test that nbgrader can grade: it raises what it would print, and is hidden from students.

    What it compares with and by travels inside it (template/hidden.txt), so that a name that a student binds anew, in
    this notebook or in tfkit, does not change the verdict. Its seeds are drawn when the assignment is made, and
    students never see them. `shown` is an `example` that students can try.
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
        "import tfkit.exercises",
        f'assert tfkit.exercises.attempted({name}), "{name} is not attempted yet"',
    ]
    tried = ["# One input and what is right for it, to try your answer before you hand it in:"]
    tried = [*tried, f'tfkit.exercises.sample({name}, "{shown}")'] if shown else []
    hidden = HIDDEN.read_text(encoding="utf-8")
    words = {
        "CHECK": packed(Path(exercises.__file__).read_text(encoding="utf-8")),
        "CELL": packed(check),
        "IMPORTS": repr(imports),
        "SEEDS": repr(tuple(secrets.randbelow(2**31) for _ in range(3))),
        "NAME": name,
    }
    for key, value in words.items():
        hidden = hidden.replace(f"__{key}__", value)
    return "\n".join([*visible, "### BEGIN HIDDEN TESTS", hidden, "### END HIDDEN TESTS", *tried])


def imports_of(notebook) -> str:
    """Every import of a notebook's cells, and all names of the module that it exports, as statements."""
    found, module = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = ["" if re.match(r"\s*[%!]", line) else line for line in cell.source.splitlines()]
            nodes = ast.parse("\n".join(lines)).body
            found += [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
            named = re.search(r"^#\| *default_exp +(\S+)", cell.source, re.M)
            module = named[1] if named else module
    exported = any(re.search(r"^#\| *export\b", c.source, re.M) for c in notebook.cells if c.cell_type == "code")
    if module and exported:
        found += [f"import tfkit.{module}"]
        found += [f"globals().update({{n: v for n, v in vars(tfkit.{module}).items() if n[:2] != '__'}})"]
    return "\n".join(dict.fromkeys(found))


def instructor(notebook):
    """The instructor's version of a chapter (an nbformat notebook): a new notebook, the given one stays as it is.

    Raises ValueError that names the exercise when one has no difficulty, no check, no solution, or the name of another,
    when its solution fails its check, its stub does not count as open, or a foreseen mistake passes.
    """
    nb = copy.deepcopy(notebook)
    cells, task, number, name, names, imports = [], "", 0, "", set(), imports_of(notebook)
    stub = solution = ""
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
            stub, solution = cell.source, solution_of(nb.cells[index + 1 :], name)
            cell.source = answered(stub, solution)
            cell.metadata["nbgrader"] = grade_cell(f"exercise-{number}-{name}")
            cell.update(outputs=[], execution_count=None)
        elif "check" in tags:
            difficulty = DIFFICULTY.search(task)
            if not difficulty:
                raise ValueError(
                    f"{name} is worth as many points as it is difficult: write 'Difficulty 2 of 5' above it"
                )
            graded(cell.source, name, imports)  # refuses what cannot be asked
            shown = example(*proven(stub, solution, cell.source, name, imports))
            cell.source = graded(cell.source, name, imports, shown)
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


def key(notebook) -> str:
    """The answer key of a chapter: task, points, solution with its notes, and the mistakes that feedback names."""
    parts, task, name = [f"# Answer key: {notebook.cells[0].source.splitlines()[0].lstrip('# ')}"], "", ""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "exercise" in tags:
            name = re.search(r"^def (\w+)", cell.source, re.M)[1]
            points = DIFFICULTY.search(task)
            parts += [re.sub(r"^#+ ", "## ", task.strip()), f"`{name}`, {points[1]} point{'s' * (points[1] != '1')}."]
        elif "check" in tags:
            _, cases, options = asked(cell.source, name, imports_of(notebook))
            parts.append("Tried with: " + "; ".join(case.name for case in cases) + ".")
            if options.get("mistakes"):
                parts.append("Mistakes that feedback names:\n\n" + "\n".join(f"- {m}" for m in options["mistakes"]))
        elif cell.cell_type == "markdown":
            task = cell.source
            if name and (found := re.search(r"<summary>[^<]*Solution[^<]*</summary>(.*?)</details>", task, re.S)):
                parts.append("Solution:\n\n" + found[1].strip())
                name = ""
    return "\n\n".join(parts) + "\n"


def assignment(notebook: Path, folder: Path | str = ROOT / "coursework") -> tuple[Path, Path, Path]:
    """Write both versions of a chapter's notebook and its answer key; returns the paths, instructor's first."""
    import nbformat

    chapter = nbformat.read(notebook, as_version=4)
    full = instructor(chapter)
    written = []
    for kind, nb in (("source", full), ("release", student(full))):
        target = Path(folder) / kind / notebook.stem / notebook.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_notebook(target, nb)
        written.append(target)
    sheet = Path(folder) / "key" / f"{notebook.stem}.md"
    sheet.parent.mkdir(exist_ok=True)
    write(sheet, key(chapter))
    return written[0], written[1], sheet

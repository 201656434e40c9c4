"""Coursework: both versions of every chapter are what nbgrader reads, and the students' one gives nothing away."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest.importorskip("nbgrader")
from nbgrader.nbgraderformat import MetadataValidator
from nbgrader.validator import Validator

import tfkit
from tfkit.authoring import coursework

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CHAPTERS = [p for p in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if '"exercise"' in p.read_text(encoding="utf-8")]

PROVEN = ("01", "10", "73")  # tensors; functions among the inputs; kernels

TASK = "### Exercise 1: twice\n\nDifficulty 4 of 5 · 5 minutes. Double it."
STUB = "def twice(x):\n    '''Twice x.'''\n    raise NotImplementedError"
CHECK = """def _twice(x):
    return x + x


tfkit.check(
    twice, _twice, [tfkit.Case("some numbers", lambda g: (torch.randn(3, generator=g),))],
    mistakes={"Once.": lambda x: x, "Three times.": lambda x: 3 * x},
)"""
SOLUTION = """<details><summary>Solution</summary>

```python
import math

def _helper(x):
    return 2 * x

def twice(x):
    return _helper(x) * math.cos(0)
```

Because.
</details>"""


@pytest.fixture
def small():
    return new_notebook(
        cells=[
            new_code_cell("import torch\nimport tfkit\n\ntfkit.set_seed(0)"),
            new_markdown_cell(TASK),
            new_code_cell(STUB, metadata={"tags": ["exercise"]}),
            new_code_cell(CHECK, metadata={"tags": ["check"], "jupyter": {"source_hidden": True}}),
            new_markdown_cell(SOLUTION),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )


def graded(nb):
    return [cell for cell in nb.cells if "nbgrader" in cell.metadata]


def test_the_instructor_gets_the_solution_in_its_place(small):
    answer, test = graded(coursework.instructor(small))
    assert "def _helper" in answer.source and "import math" in answer.source
    place = answer.source.index("def twice")
    assert answer.source.index("'''Twice x.'''") < answer.source.index(
        "    ### BEGIN SOLUTION\n    return _helper(x)", place
    )
    assert test.metadata.nbgrader.points == 4 and test.metadata.nbgrader.locked and not test.metadata.nbgrader.solution
    assert answer.metadata.nbgrader.solution and not answer.metadata.nbgrader.grade
    assert "### BEGIN HIDDEN TESTS" in test.source and "# - some numbers" in test.source and "_twice" not in test.source
    assert len(small.cells) == 5 and small.cells[2].source == STUB  # the chapter itself is untouched


def test_the_students_get_neither_solution_nor_hidden_tests(small):
    nb = coursework.student(coursework.instructor(small))
    answer, test = graded(nb)
    whole = "\n".join(cell.source for cell in nb.cells)
    for secret in ("_helper", "_twice", "BEGIN", "Because", "math", "Three times"):
        assert secret not in whole, secret
    assert "def twice(x):\n    '''Twice x.'''\n    # YOUR CODE HERE\n    raise NotImplementedError()" in answer.source
    assert test.metadata.nbgrader.checksum and test.metadata.editable is False


def verdict(nb, folder):
    """What nbgrader's own validator says when it runs a notebook: the number of failed test cells."""
    path = folder / "it.ipynb"
    nbformat.write(nb, path)
    result = Validator().validate(str(path))
    assert "changed" not in result and "type_changed" not in result, result
    return len(result.get("failed", []))


@pytest.mark.slow
def test_nbgrader_passes_the_instructor_and_a_wrong_answer_does_not_validate(small, tmp_path):
    full = coursework.instructor(small)
    assert verdict(full, tmp_path) == 0
    handed_out = coursework.student(full)
    graded(handed_out)[0].source = "def twice(x):\n    return 3 * x"
    assert verdict(handed_out, tmp_path) == 1


SHELL = """
import json, os, sys
from IPython.core.interactiveshell import InteractiveShell
setup, test, attempts, file = json.loads(sys.stdin.read())
shell = InteractiveShell.instance()
sys.modules["__main__"] = shell.user_module
shell.run_cell(setup, store_history=True).raise_error()
for name, answer in attempts.items():
    if os.fork() == 0:  # a process of its own, since an attempt may spoil all that it shares
        out = open(file, "a")
        shell.run_cell(answer, store_history=True)
        result = shell.run_cell(test, store_history=True)
        print(json.dumps([name, repr(result.error_before_exec or result.error_in_exec or "")]), file=out, flush=True)
        os._exit(0)
    os.wait()
"""
GOOD = "def twice(x):\n    return 2 * x"
RIGHT = {
    "plain": GOOD,
    "a raise left below": GOOD + "\n    raise NotImplementedError()",
    "a helper": "def half(x):\n    return x / 2\n\ndef twice(x):\n    return 4 * half(x)",
    "a name rebound above": "torch = Case = None\n" + GOOD,
    "a lambda": "twice = lambda x: 2 * x",
    "an attribute called eval": "def twice(x):\n    torch.nn.Identity().eval()\n    return x + x",
}
WRONG = {
    "the stub": STUB,
    "none": "def twice(x):\n    return None",
    "a wrong answer": "def twice(x):\n    return 3 * x",
    "check replaced": "tfkit.check = lambda *a, **k: True\ndef twice(x):\n    return None",
    "the parts of check replaced": (
        "tfkit.exercises._difference = tfkit.exercises._attempt = lambda *a: ''\n"
        "tfkit.exercises.judge = lambda *a, **k: True\ndef twice(x):\n    return None"
    ),
    "the hidden reference": "def twice(x):\n    return _twice(x)",
    "the reference by globals": "def twice(x):\n    return globals()['_twice'](x)",
    "the reference by frames": (
        "import sys\ndef twice(x):\n    f = sys._getframe()\n    while 'expected' not in f.f_locals:\n"
        "        f = f.f_back\n    return f.f_locals['expected']"
    ),
    "code made from text": "exec('def twice(x):\\n    return 2 * x')",
    "the answer read from a file": "def twice(x):\n    exec(open(tfkit.__file__).read())\n    return 2 * x",
    "the cells read": "def twice(x):\n    return eval(In[-1][-5:]) or 2 * x",
    "torch replaced": (
        "torch.where = lambda *a: torch.zeros(1)\ntorch.Tensor.abs = lambda t: 0 * t\n"
        "torch.Tensor.max = lambda t, *a: torch.zeros(())\ndef twice(x):\n    return x"
    ),
    "a class that reads": (
        "class Reader:\n    def __call__(self, x):\n        open('x')\n        return 2 * x\n\ntwice = Reader()"
    ),
    "always equal": (
        "class Yes(torch.Tensor):\n    @classmethod\n"
        "    def __torch_function__(cls, f, t, a=(), k=None):\n        return torch.zeros(())\n\n"
        "def twice(x):\n    return x.as_subclass(Yes)"
    ),
    "the first seeds remembered": (
        "known = {}\nfor seed in range(100):\n"
        "    x = torch.randn(3, generator=torch.Generator().manual_seed(seed))\n    known[x[0].item()] = 2 * x\n"
        "def twice(x):\n    return known.get(x[0].item(), x)"
    ),
}


def test_an_adversary_gains_nothing_and_right_work_loses_nothing(small, tmp_path):
    _, test = graded(coursework.instructor(small))
    file = tmp_path / "verdicts"
    given = json.dumps([small.cells[0].source, test.source, RIGHT | WRONG, str(file)])
    done = subprocess.run([sys.executable, "-c", SHELL], input=given, capture_output=True, text=True, timeout=300)
    assert file.exists(), done.stderr[-2000:]
    said = dict(json.loads(line) for line in file.read_text().splitlines())
    assert set(said) == set(RIGHT | WRONG), done.stdout[-2000:] + done.stderr[-2000:]
    assert {name: said[name] for name in RIGHT if said[name] != "''"} == {}
    assert [name for name in WRONG if said[name] == "''"] == []
    told = {
        "a wrong answer": "Three times.",
        "torch replaced": "was replaced",
        "code made from text": "not written in a cell",
        "the reference by frames": "does not use _getframe, f_back",
    }
    for name, words in told.items():
        assert words in said[name], said[name]


def swap(cell, old: str, new: str) -> None:
    assert old in cell.source
    cell.source = cell.source.replace(old, new)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda cells: cells[1].update(source="### Exercise 1"), "twice is worth as many points as it is difficult"),
        (lambda cells: cells.pop(4), "twice has no solution"),
        (lambda cells: cells.pop(3), "1 exercises and 0 checks"),
        (lambda cells: cells.extend(copy.deepcopy(cells[1:])), "two exercises ask for twice"),
        (lambda cells: cells[3].update(source="1 + 1"), "should call tfkit.check once"),
        (lambda cells: swap(cells[4], "cos(0)", "cos(1)"), "the solution of twice does not pass its own check"),
        (lambda cells: swap(cells[3], "3 * x", "2 * x"), "a wrong answer to twice passes .*: Three times."),
    ],
)
def test_what_would_go_wrong_silently_is_refused(small, change, message):
    change(small.cells)
    with pytest.raises(ValueError, match=message):
        coursework.instructor(small)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_becomes_an_assignment(path, tmp_path, monkeypatch):
    if path.stem[:2] not in PROVEN:  # what the house rules prove of every chapter's exercises is not proven twice
        monkeypatch.setattr(coursework, "proven", lambda *given: (None, None, None))
        monkeypatch.setattr(coursework, "example", lambda *given: "")
        monkeypatch.setattr(coursework, "key", lambda notebook: "")
    full, handed_out, key = coursework.assignment(path, tmp_path)
    full, handed_out = (nbformat.read(p, as_version=4) for p in (full, handed_out))
    sheet = key.read_text(encoding="utf-8")
    if path.stem[:2] in PROVEN:
        assert sheet.count("\nSolution:\n") == len(graded(full)) / 2 <= sheet.count("\n- ") / 2
        assert any(".sample(" in cell.source for cell in graded(handed_out))
    for nb in (full, handed_out):
        MetadataValidator().validate_nb(nb)
        names = [cell.metadata.nbgrader.grade_id for cell in graded(nb)]
        assert len(names) == len(set(names)) >= 4
        assert all(re.fullmatch(r"[\w-]+", name) for name in names)
        assert not any("<summary>Solution" in cell.source for cell in nb.cells)
    secret = [
        line.strip()
        for cell in graded(full)
        for part in re.findall(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n(.*?)### END", cell.source, re.S)
        for line in part.splitlines()
        if len(line.strip()) > 30
    ]
    shown = "\n".join(cell.source for cell in graded(handed_out))
    assert secret and not [line for line in secret if line in shown]
    for cell in graded(full):
        compile(cell.source, path.stem, "exec")


def test_students_can_try_one_example(small):
    *_, test = coursework.student(coursework.instructor(small)).cells
    tried = next(line for line in test.source.splitlines() if ".sample(" in line)
    for answer, message in [
        ("def twice(x):\n    return 2 * x", ""),
        ("def twice(x):\n    return 0", "it should return a tensor, and returns int 0"),
        ("def twice(x):\n    return 3 * x", "the values are not"),
        ("def twice(x):\n    x += x\n    return x", "it changes its input in place"),
    ]:
        place = {"tfkit": tfkit}
        exec(answer, place)
        try:
            exec(tried, place)
            said = ""
        except AssertionError as error:
            said = str(error)
        assert said.startswith("Not yet, for the inputs (tensor([") == bool(message) and message in said


@pytest.mark.parametrize(
    "stub, solution, message",
    [
        ("x = 1", SOLUTION, "one function that raises NotImplementedError once"),
        (STUB, "def thrice(x):\n    return 3 * x", "does not define twice"),
    ],
)
def test_what_is_no_exercise_is_refused(stub, solution, message):
    with pytest.raises(ValueError, match=message):
        coursework.answered(stub, solution)


def test_a_chapter_without_exercises_is_refused():
    with pytest.raises(ValueError, match="no exercises"):
        coursework.instructor(new_notebook(cells=[new_markdown_cell("# Nothing")]))

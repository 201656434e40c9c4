"""Exercises of every notebook: the stub counts as not attempted, the solution passes, plausible mistakes are named.

An exercise is, in this order: Markdown with the task, its difficulty, its minutes and folded hints; a code cell tagged
`exercise` with a stub; a hidden code cell tagged `check` that calls `tfkit.check`; Markdown with a folded solution.
"""

import json
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import tfkit
import tfkit.exercises

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
original = tfkit.exercises.check


@dataclass
class Exercise:
    stub: str
    task: str
    check: str = ""
    hidden: bool = False
    solution: str = ""

    def problems(self):
        """What is missing, each with the way to mend it."""
        name = f"the exercise {self.stub.strip().splitlines()[0]!r}"
        if "NotImplementedError" not in self.stub:
            yield f"{name} has no stub: let the function raise NotImplementedError"
        if not self.check:
            yield f"{name} is not followed by a code cell tagged `check` that calls tfkit.check(...)"
        elif not self.hidden:
            yield f'{name}: fold its check; set "jupyter": {{"source_hidden": true}} in that cell\'s metadata'
        if not self.solution:
            yield f"{name} needs Markdown after the check: <details><summary>Solution</summary> with a ```python block"
        if not re.search(r"difficulty\W{0,12}([1-5]\b|★)", self.task, re.I):
            yield f"{name} does not state its difficulty: write 'Difficulty 2 of 5 · 10 minutes' above it"
        if not re.search(r"\d+\s*min", self.task):
            yield f"{name} does not say how many minutes it takes: write 'Difficulty 2 of 5 · 10 minutes' above it"
        if self.task.count("<details>") < 2:
            yield f"{name} has fewer than two hints: <details><summary>Hint 1</summary>...</details>, and more"


def exercises(cells: list[dict]) -> list[Exercise]:
    found: list[Exercise] = []
    task = ""
    for cell in cells:
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "exercise" in tags:
            found.append(Exercise(source, task))
            task = ""
        elif cell["cell_type"] == "code":
            if "check" in tags and found and not found[-1].check:
                found[-1].check = source
                found[-1].hidden = bool(cell["metadata"].get("jupyter", {}).get("source_hidden"))
            task = ""
        elif found and not found[-1].solution and re.search(r"<summary>[^<]*Solution", source):
            found[-1].solution = "\n".join(re.findall(r"```python\n(.*?)```", source, re.S))
            task = ""
        else:
            task += "\n" + source
    return found


class Attempts:
    """A namespace with the notebook's imports and exported code, in which `check` keeps what it was asked."""

    def __init__(self, name: str, cells: list[dict], monkeypatch):
        self.calls: list[tuple] = []
        monkeypatch.setattr(tfkit.exercises, "check", self.record)
        monkeypatch.setattr(tfkit, "check", self.record, raising=False)
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        self.namespace = vars(module)
        seeded = False
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and (not seeded or re.search(r"^#\| *export\b", source, re.M)):
                self.run(source)
                seeded = seeded or "set_seed(" in source

    def run(self, source: str) -> None:
        lines = ["" if re.match(r"\s*[%!]", line) else line for line in source.splitlines()]
        exec(compile("\n".join(lines), "<notebook cell>", "exec"), self.namespace)
        for name, value in self.namespace.items():
            if value is original:
                self.namespace[name] = self.record

    def record(self, fn, reference, cases, *, mistakes=None, **options):
        result = original(fn, reference, cases, mistakes=mistakes, **options)
        self.calls.append((result, reference, cases, dict(mistakes or {}), options))
        return result

    def attempt(self, answer: str, check: str):
        """Run a cell with an answer and the cell that checks it; what the check was asked, and its result."""
        self.calls.clear()
        self.run(answer)
        self.run(check)
        assert len(self.calls) == 1, (
            f"the check cell should call tfkit.check once, and calls it {len(self.calls)} times"
        )
        return self.calls[0]


def try_exercise(exercise: Exercise, attempts: Attempts) -> None:
    result, *_ = attempts.attempt(exercise.stub, exercise.check)
    assert result.status == "open", f"the untouched stub should count as not attempted: {result.message}"
    result, reference, cases, mistakes, options = attempts.attempt(exercise.solution, exercise.check)
    assert result.status == "passed", f"the solution does not pass: {result.message}"
    assert len(mistakes) >= 2, (
        f"{len(mistakes)} mistakes are foreseen; pass at least two plausible ones as mistakes={{...}}"
    )
    for message, wrong in mistakes.items():
        result = original(wrong, reference, cases, mistakes=mistakes, **options)
        assert result.status == "failed", f"a wrong answer passes: {message!r}; add a case that tells it apart"
        named = [m for m in mistakes if m in result.message]
        assert named == [message], f"a wrong answer should be told {message!r}, and is told: {result.message}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises(path, monkeypatch):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = exercises(cells)
    if path.stem[:2] not in ("00", "99"):
        assert len(found) >= 2, f"a chapter has at least two exercises (code cells tagged `exercise`), not {len(found)}"
    problems = [problem for exercise in found for problem in exercise.problems()]
    assert not problems, "\n".join(problems)
    attempts = Attempts(f"notebook_{path.stem}", cells, monkeypatch)
    for exercise in found:
        try_exercise(exercise, attempts)


# A small notebook with one good exercise, and what each change to it must lead to.

TASK = (
    "### Exercise 1\n\nDifficulty 1 of 5 · 5 minutes. Double a number.\n\n"
    "<details><summary>Hint 1</summary>Add.</details><details><summary>Hint 2</summary>x + x</details>"
)
STUB = "def double(x):\n    raise NotImplementedError"
CHECK = """check(double, lambda x: 2 * x, [Case("any", lambda g: (torch.randn(3, generator=g),))], mistakes={
    "That is the square.": lambda x: x * x,
    "That is half of it.": lambda x: x / 2,
})"""
SOLUTION = "<details><summary>Solution</summary>\n\n```python\ndef double(x):\n    return x + x\n```\n</details>"


def small_notebook(task=TASK, stub=STUB, check=CHECK, solution=SOLUTION, hidden=True) -> list[dict]:
    def cell(kind: str, source: str, **metadata) -> dict:
        return {"cell_type": kind, "source": source, "metadata": metadata}

    return [
        cell("code", "%matplotlib inline\nimport torch\nfrom tfkit import Case, check, set_seed\nset_seed(0)"),
        cell("code", "raise RuntimeError('a demonstration is not needed here')"),
        cell("markdown", task),
        cell("code", stub, tags=["exercise"]),
        cell("code", check, tags=["check"], jupyter={"source_hidden": hidden}),
        cell("markdown", solution),
    ]


def test_a_good_exercise_is_accepted(monkeypatch):
    cells = small_notebook()
    (found,) = exercises(cells)
    assert not list(found.problems())
    try_exercise(found, Attempts("small", cells, monkeypatch))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": TASK.replace("Difficulty 1 of 5", "Easy")}, "difficulty"),
        ({"task": TASK.replace("5 minutes", "soon")}, "minutes"),
        ({"task": TASK.replace("<details><summary>Hint 2", "<summary>Hint 2")}, "hints"),
        ({"stub": "def double(x):\n    pass"}, "stub"),
        ({"hidden": False}, "source_hidden"),
        ({"solution": "Add it to itself."}, "Solution"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incomplete_exercise_is_found(change, message):
    (found,) = exercises(small_notebook(**change))
    assert any(message in problem for problem in found.problems())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stub": "def double(x):\n    return 0  # NotImplementedError"}, "not attempted"),
        ({"solution": SOLUTION.replace("x + x", "x * x")}, "does not pass"),
        ({"check": CHECK.replace('"That is half of it.": lambda x: x / 2,', "")}, "at least two"),
        ({"check": CHECK.replace("x / 2", "x + x")}, "a wrong answer passes"),
        ({"check": CHECK.replace("x / 2", "x * x")}, "should be told"),
        ({"check": "pass"}, "call tfkit.check once"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_weak_exercise_is_found(change, message, monkeypatch):
    cells = small_notebook(**change)
    with pytest.raises(AssertionError, match=message):
        try_exercise(*exercises(cells), Attempts("small", cells, monkeypatch))

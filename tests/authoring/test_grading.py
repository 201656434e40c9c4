"""Grading a course folder: broken notebooks cost nobody else's marks, right work loses none, and no cheat gains any."""

import copy
import csv

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tfkit.authoring import coursework, grading
from tfkit.exercises import OPEN

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
CHECK = """def _twice(x):
    return x + x


tfkit.check(
    NAME, _twice, [tfkit.Case("some numbers", lambda g: (torch.randn(3, generator=g),))],
    mistakes={"Once.": lambda x: x, "Three times.": lambda x: 3 * x},
)"""
STUB = "def NAME(x):\n    raise NotImplementedError"
GOOD = "def NAME(x):\n    return 2 * x"
NONE = "def NAME(x):\n    return None"

# What each does is done before the answer is asked, in the student's process; `{source}` is the instructor's notebook.
CHEATS = {
    "check": f"tfkit.check = tfkit.exercises.check = lambda *a, **k: True\n{NONE}",
    "judge": f"tfkit.exercises.judge = tfkit.exercises._difference = lambda *a, **k: ''\n{NONE}",
    "reference": "def NAME(x):\n    return _twice(x)",
    "frames": (
        "import sys\ndef NAME(x):\n    f = sys._getframe()\n    while 'expected' not in f.f_locals:\n"
        "        f = f.f_back\n    return f.f_locals['expected']"
    ),
    "chapter": (
        "from pathlib import Path\ndef NAME(x):\n    text = Path(tfkit.__file__).parents[1].joinpath("
        "'notebooks/01_attention.ipynb').read_text()\n    return 2 * x"
    ),
    "instructor": "def NAME(x):\n    text = open('{source}').read()\n    return 2 * x",
    "link": "import os\ndef NAME(x):\n    os.symlink('{source}', 'it')\n    return 2 * x if open('it').read() else x",
    "program": "import subprocess\ndef NAME(x):\n    subprocess.run(['cat', '{source}'])\n    return 2 * x",
    "builtins": f"import builtins\nbuiltins.exec = builtins.isinstance_ = lambda *a, **k: True\n{NONE}",
    "handler": f"get_ipython().set_custom_exc((BaseException,), lambda *a, **k: None)\n{NONE}",
    "equal": (
        "class Yes(torch.Tensor):\n    @classmethod\n    def __torch_function__(cls, f, t, a=(), k=None):\n"
        "        return torch.zeros(())\n\ndef NAME(x):\n    return x.as_subclass(Yes)"
    ),
    "seeds": (
        "known = {}\nfor seed in range(100):\n    x = torch.randn(3, generator=torch.Generator().manual_seed(seed))\n"
        "    known[x[0].item()] = 2 * x\ndef NAME(x):\n    return known.get(x[0].item(), x)"
    ),
    "sample": "def NAME(x):\n    return 2 * x if seen else x\nseen = 0",
    "channel": (
        "import os\ndef NAME(x):\n    for number in range(3, 20):\n"
        "        try:\n            os.write(number, b'right')\n"
        "        except OSError:\n            pass\n    return x"
    ),
}
RIGHT = {
    "plain": GOOD,
    "below": GOOD + "\n    raise NotImplementedError()",
    "renamed": f"partial = tfkit = None\n{GOOD}",
    "lambdas": "NAME = lambda x: 2 * x",
    "printing": "import sys, os\nprint(open(os.devnull).read(), file=sys.stderr)\n" + GOOD,
    "demonstrated": "def NAME(x):\n    return 2 * x + shift[0]",
    "later": "def NAME(x):\n    return defined_below(x)",
}


# All in one notebook: right work, cheats, right work that forgets tfkit, an answer that ends Python, and last of all
# what breaks the process for the cells below it.
LAST = ["renamed", "channel", "ends", "handler", "builtins"]
NAMES = [name for name in (*RIGHT, *CHEATS) if name not in LAST] + LAST


def chapter(names):
    """A chapter with the same exercise under each of these names."""
    cells = [new_code_cell("import torch\nimport tfkit\n\ntfkit.set_seed(0)")]
    cells += [new_code_cell("shift = [torch.zeros(3)]")]  # not run at first, but for an answer that needs it
    for number, name in enumerate(names, 1):
        solution = GOOD.replace("NAME", name)
        cells += [
            new_markdown_cell(f"### Exercise {number}: {name}\n\nDifficulty 2 of 5 · 5 minutes."),
            new_code_cell(STUB.replace("NAME", name), metadata={"tags": ["exercise"]}),
            new_code_cell(CHECK.replace("NAME", name), metadata={"tags": ["check"]}),
            new_markdown_cell(f"<details><summary>Solution</summary>\n\n```python\n{solution}\n```\n</details>"),
        ]
    return new_notebook(cells=[new_markdown_cell("# It"), *cells], metadata=KERNEL)


@pytest.fixture(scope="module")
def made():
    """The instructor's and the students' version."""
    pytest.importorskip("nbgrader")
    full = coursework.instructor(chapter(NAMES))
    return full, coursework.student(full)


@pytest.fixture
def course(made, tmp_path):
    """A course folder, and a function that hands something in there."""
    place = tmp_path / "source" / "it"
    place.mkdir(parents=True)
    nbformat.write(made[0], place / "it.ipynb")

    def hand_in(student: str, answers: dict[str, str], change=lambda nb: None):
        nb = copy.deepcopy(made[1])
        for cell in nb.cells:
            kind, _, name = cell.metadata.get("nbgrader", {}).get("grade_id", "").partition("-")
            if kind == "exercise" and name.split("-", 1)[1] in answers:
                cell.source = answers[name.split("-", 1)[1]]
        change(nb)
        target = tmp_path / "submitted" / student / "it"
        target.mkdir(parents=True)
        nbformat.write(nb, target / "it.ipynb")

    return tmp_path, hand_in


def marks(folder) -> dict[str, dict[str, str]]:
    with (folder / "grades" / "it.csv").open(encoding="utf-8") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_class(course):
    """One does all at once, right work, cheats and cells that end Python or never end; one is right and no more; one
    cannot be read; one handed in nothing. Each start of Python costs seconds, so that there are few.
    """
    folder, hand_in = course
    source = str(folder / "source" / "it" / "it.ipynb")
    written = {name: text.replace("NAME", name).replace("{source}", source) for name, text in (CHEATS | RIGHT).items()}
    written["ends"] = "import os\ndef ends(x):\n    os._exit(1)"

    def busy(nb):
        stub = copy.deepcopy(next(cell for cell in nb.cells if "def plain" in cell.source))
        stub.id, stub.source = "another", STUB.replace("NAME", "plain")
        below = next(i for i, cell in enumerate(nb.cells) if "def renamed" in cell.source)
        nb.cells[below:below] = [stub, new_code_cell("def defined_below(x):\n    return x + x")]
        nb.cells.insert(1, new_code_cell("import os\nos._exit(3)"))
        nb.cells.insert(2, new_code_cell("import time\ntime.sleep(1e6)"))

    hand_in("ada", written, busy)
    hand_in("bob", {"plain": written["plain"]})
    hand_in("dan", written)
    (folder / "submitted" / "dan" / "it" / "it.ipynb").write_text('{"cells": [', encoding="utf-8")
    (folder / "submitted" / "eve").mkdir()
    said = list(grading.grade_course(folder, jobs=2, limit=20))
    right = str(2 * len(RIGHT))
    assert said[0] == f"it ada: {right} of {2 * len(NAMES)}" and len(said) == 5 and said[-1].endswith("it.csv")
    found = marks(folder)
    assert [*found["ada"]] == ["student", "points", "of", *NAMES, "notes"]
    ada = {name: found["ada"][name] for name in NAMES}
    assert ada == dict.fromkeys(NAMES, "0") | dict.fromkeys(RIGHT, "2") and found["ada"]["points"] == right
    assert "plain stands in 2 cells" in found["ada"]["notes"]
    assert "code cell 1 ends Python" in found["ada"]["notes"]
    assert "code cell 2 takes longer than 20 seconds" in found["ada"]["notes"]
    assert (found["bob"]["plain"], found["bob"]["points"], found["bob"]["notes"]) == ("2", "2", "")
    assert "cannot be read" in found["dan"]["notes"] and found["eve"]["notes"] == "nothing was handed in"

    pages = {who: (folder / "feedback" / who / "it" / "it.html").read_text(encoding="utf-8") for who in found}
    assert OPEN not in pages["ada"], "every cheat was run and judged"
    assert pages["bob"].count(OPEN) == len(NAMES) - 1
    assert "Exercise 1: plain" in pages["ada"] and "Not yet (some numbers): it returns None" in pages["ada"]
    assert "an answer reads no notebook" in pages["ada"] and "Not yet: the answer ends Python." in pages["ada"]
    for page in pages.values():
        assert "_twice(x)\n    return x + x" not in page and "randn(3, generator=g)" not in page


@pytest.mark.parametrize("folder", ["", "source/it"])
def test_what_is_no_course_is_refused(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "submitted" / "ada").mkdir(parents=True)
    with pytest.raises(ValueError, match="should hold source/01_attention"):
        list(grading.grade_course(tmp_path))
    if folder:
        nbformat.write(new_notebook(cells=[new_markdown_cell("# It")]), tmp_path / folder / "it.ipynb")
        with pytest.raises(ValueError, match="no exercises in it; write it with `make assignment"):
            list(grading.grade_course(tmp_path))


def test_a_notebook_of_nearly_the_right_name_is_found(tmp_path):
    place = tmp_path / "submitted" / "ada" / "01_attention"
    place.mkdir(parents=True)
    assert grading.handed_in(tmp_path, "ada", "01_attention") is None
    (place / "01_attention (1).ipynb").write_text("")
    assert grading.handed_in(tmp_path, "ada", "01_attention").name == "01_attention (1).ipynb"
    (place / "01_attention.ipynb").write_text("")
    assert grading.handed_in(tmp_path, "ada", "01_attention").name == "01_attention.ipynb"


def test_cells_that_only_define_are_light():
    assert grading.light("import torch\n\n\ndef f():\n    return 1\n\n\ntfkit.set_seed(0)")
    assert not grading.light("model = fit()") and not grading.light("%matplotlib inline")

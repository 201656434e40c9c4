"""`make check NB=20` and `make times`: everything that concerns one chapter, and what it costs.

Each step is a pytest of its own, so that its processor time can be told apart; the findings come from its JUnit report.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tfkit.authoring.files import ROOT, write
from tfkit.authoring.notebooks import ENVIRONMENT, export, tidy

TIMES = ROOT / "notebooks" / "results" / "times.csv"
COLUMNS = ("chapter", "notebook", "tests")


def timed(command: list[str], folder: Path = ROOT) -> tuple[subprocess.CompletedProcess, float]:
    """Run a command: how it ended, and the seconds of processor time of it and of all that it waited for.

    Kernels of notebooks are among the latter; waiting and other programs' work count for nothing.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def pytest(*arguments: str, root: Path = ROOT) -> tuple[list[str], float]:
    """Run pytest with these arguments in one process: one line per finding, and the seconds of processor time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--tb=short", f"--junitxml={file}", *arguments]
        done, seconds = timed(command, root)
        if done.returncode == 5:  # nothing to collect
            return [], seconds
        if done.returncode not in (0, 1):
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            return [f"pytest {' '.join(arguments)} stopped: {' '.join(said[:3])[:300]}"], seconds
        return findings(file.read_text(encoding="utf-8")), seconds


def findings(report: str) -> list[str]:
    """One line per finding in a JUnit report: a rule's problem with its mend, or a test with what it said."""
    lines = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        for failed in [*case.findall("failure"), *case.findall("error")]:
            body = [line[1:] for line in (failed.text or "").splitlines() if line.startswith("E ")]
            said = [line.strip() for line in body or failed.get("message", "").splitlines() if line.strip()]
            said = [re.sub(r"^(AssertionError|Failed): ?", "", line) for line in said]
            said = [line for line in said if not line.startswith("assert not [")] or [failed.get("message", "")]
            place = f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}"
            if "tests/house/test_rules" in place and len(said) > 1:
                rule, _, mend = said[0].partition(": ")
                lines += [f"{rule}: {problem}. To mend it: {mend}" for problem in said[1:]]
            else:
                lines.append(f"{place}: {' '.join(said[:2])[:300]}")
    return lines


def steps(notebook: Path) -> dict[str, list[str]]:
    """The arguments of pytest for each step of a chapter's check."""
    name, topic, root = notebook.stem, notebook.stem[3:], notebook.resolve().parents[1]
    own = root / "tests" / "zoo" / f"test_{topic}.py"
    return {
        "notebook": [f"notebooks/{notebook.name}"],
        "tests": [f"tests/zoo/{own.name}"] if own.exists() else [],
        "contracts": ["tests/test_contracts_on_examples.py", "-k", f"{topic}-"],
        "house": ["tests/house", "tests/authoring/test_coursework.py", "-k", name],
    }


def check(notebook: Path) -> list[str]:
    """Export a chapter and run its tests, its contracts, the house rules on it and its notebook.

    Returns one line per finding. The chapter's row in the table of times is brought up to date.
    """
    tidy(notebook)
    try:
        export(notebook)
    except Exception as error:
        return [f"{notebook.name} cannot be exported: {error}"]
    found, root = [], notebook.resolve().parents[1]
    spent: dict[str, float] = {}
    for step, arguments in steps(notebook).items():
        if step == "house" and not found:  # the rule about times reads what was just measured
            record({notebook.stem: spent}, root)
        if arguments:
            problems, spent[step] = pytest(*arguments, root=root)
            found += problems
    return found


def measure(notebook: Path) -> dict[str, float]:
    """The seconds of processor time of a chapter's notebook and of its tests. Raises RuntimeError when one fails."""
    spent, root = {}, notebook.resolve().parents[1]
    for step in ("notebook", "tests"):
        arguments = steps(notebook)[step]
        if arguments:
            problems, spent[step] = pytest(*arguments, root=root)
            if problems:
                raise RuntimeError(f"{notebook.stem} fails, so its time says nothing: {problems[0]}")
    return spent


def read_times(root: Path = ROOT) -> dict[str, dict[str, float]]:
    """Chapter name to its seconds {"notebook": ..., "tests": ...}, as stored. Of two rows for one, the last counts."""
    path = root / TIMES.relative_to(ROOT)
    if not path.exists():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1].isdigit()]
    return {row["chapter"]: {key: float(row[key]) for key in COLUMNS[1:]} for row in csv.DictReader(lines, COLUMNS)}


def record(measured: dict[str, dict[str, float]], root: Path = ROOT) -> None:
    """Put rows into the table of times, keeping the others that still have a notebook."""
    rows = {**read_times(root), **measured}
    text = (
        f"# seconds of processor time on one core ({machine()}), start of the processes included\n{','.join(COLUMNS)}\n"
    )
    for name, spent in sorted(rows.items()):
        if (root / "notebooks" / f"{name}.ipynb").exists():
            text += f"{name},{spent.get('notebook', 0):.0f},{spent.get('tests', 0):.0f}\n"
    path = root / TIMES.relative_to(ROOT)
    path.parent.mkdir(exist_ok=True)
    write(path, text)


def machine() -> str:
    """The processor in words, without model numbers: "AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    words = [word for word in re.split(r"[\s()]+", found[1] if found else platform.machine()) if word.isalpha()]
    return " ".join(words) or "unknown"

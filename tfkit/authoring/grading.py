"""Grades for a course folder: `make grade FOLDER=mycourse` reads what students handed in and writes marks and feedback.

    mycourse/source/01_attention/01_attention.ipynb           the instructor's version, from `make assignment`
    mycourse/submitted/ada/01_attention/01_attention.ipynb    what ada handed in
    mycourse/grades/01_attention.csv                          written: a line for each student
    mycourse/feedback/ada/01_attention/01_attention.html      written: what ada may read

These are nbgrader's folders, and nbgrader is not needed. Each notebook runs in a process of its own (answering.py),
which is given inputs and gives back values. References, seeds and the comparison stay in another process that runs no
line of a student's, so there is nothing in a student's reach that could make a wrong answer right.
"""

from __future__ import annotations

import ast
import csv
import html
import io
import multiprocessing
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tfkit import exercises
from tfkit.authoring import coursework
from tfkit.authoring.asking import Gone, Session
from tfkit.authoring.checking import read_times
from tfkit.authoring.files import ROOT, write

PRIVATE = ("source", "release", "key", "submitted", "autograded", "feedback", "grades")  # folders of a course
STARTS = 6  # how often a notebook that ends Python or never ends is begun anew without the cell that did it


@dataclass
class Task:
    """An exercise of the instructor's notebook."""

    name: str
    title: str
    points: int
    check: str
    imports: str


@dataclass
class Graded:
    """What one student gets for one notebook: points and words for each exercise, and what the teacher should know."""

    student: str
    points: dict[str, int] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)

    def passes(self, name: str) -> bool:
        return self.points.get(name, 0) > 0


def tasks(notebook) -> list[Task]:
    """The exercises of an instructor's notebook. Raises ValueError when it has none, or one cannot be asked."""
    found, title = [], ""
    for cell in notebook.cells:
        about = cell.metadata.get("nbgrader", {})
        if cell.cell_type == "markdown" and (heading := re.search(r"^#+ +(Exercise.*)$", cell.source, re.M)):
            title = heading[1]
        elif about.get("grade") and about.get("grade_id", "").startswith("test-"):
            name = about["grade_id"].split("-", 2)[2]
            found.append(Task(name, title or name, about["points"], *coursework.hidden_in(cell.source)))
    if not found:
        raise ValueError("there are no exercises in it; write it with `make assignment NB=...`")
    return found


def cells_of(path: Path) -> list:
    """The code cells of a notebook of a student's that are to run: all but the locked tests.

    Raises ValueError with words for the student when it cannot be read.
    """
    import nbformat

    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8-sig"), as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and isinstance(cell.source, str)]
    except Exception as error:
        raise ValueError(f"the notebook cannot be read ({type(error).__name__}); hand it in again") from None
    locked = lambda cell: cell.metadata.get("nbgrader", {}).get("grade") is True or "HIDDEN TESTS" in cell.source
    return [cell.source for cell in cells if not locked(cell)]


def readable(path: Path) -> bool:
    try:
        return bool(cells_of(path))
    except ValueError:
        return False


def grade(student: str, path: Path | None, source: Path, limit: float, seeds: tuple[int, ...]) -> Graded:
    """Grade one notebook. What fails, ends Python or never ends costs the points of its own exercise alone."""
    import nbformat

    chapter = nbformat.read(source, as_version=4)
    asked = {task.name: task for task in tasks(chapter)}
    result = Graded(student, words=dict.fromkeys(asked, exercises.OPEN))
    if path is None:
        result.notes.append("nothing was handed in")
        return result
    try:
        cells = cells_of(path)
    except ValueError as error:
        result.words = dict.fromkeys(asked, str(error))
        result.notes.append(str(error))
        return result
    exercises.SEEDS = seeds
    theirs = {cell.source.strip() for cell in chapter.cells if "nbgrader" not in cell.metadata}
    given = [(cell, cell.strip() not in theirs) for cell in cells]
    checks = {name: coursework.asked(task.check, name, task.imports) for name, task in asked.items()}
    for name in asked:
        defining = [cell for cell in cells if re.search(rf"^(def +{name}\b|{name} *=|class +{name}\b)", cell, re.M)]
        result.answers[name] = "\n\n\n".join(defining)
        if len(defining) > 1:
            result.notes.append(f"{name} stands in {len(defining)} cells; the best of them counts")
        elif not defining:
            result.notes.append(f"no cell defines {name}")
    heavy = {index for index, (cell, own) in enumerate(given) if not own and not light(cell)}
    lost: tuple[set, set] = (set(), set())
    _run(result, given, checks, asked, path, source, limit, heavy, *lost)
    if heavy and any(not result.passes(name) and words != exercises.OPEN for name, words in result.words.items()):
        _run(result, given, checks, asked, path, source, limit, set(), *lost)
    result.notes = [*dict.fromkeys(result.notes)]
    return result


def light(cell: str) -> bool:
    """Whether a cell of the chapter only imports and defines; the others run for answers that fail without them."""
    try:
        body = ast.parse(cell).body
    except SyntaxError:  # magics
        return False
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    return all(isinstance(node, kinds) or "set_seed" in ast.unparse(node) for node in body)


def _run(
    result: Graded, given, checks, asked, path: Path, source: Path, limit: float,
    skipped: set[int], left_out: set[int], ended: set[tuple[str, int]],
) -> None:  # fmt: skip
    """Run the cells and judge each answer when its cell has run, and those that do not pass once more at the end.

    Cells that end Python or take too long join `left_out`, answers that do join `ended` with the place of their cell.
    """
    secret = [str(ROOT / "coursework"), *(str(source.parents[2] / name) for name in PRIVATE)]
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for file in path.parent.iterdir():  # pictures or modules that belong to the notebook
                if file.is_file() and file.suffix != ".ipynb":
                    shutil.copy(file, folder)
            index, name = -1, ""
            try:
                with Session(folder, limit, names=[*asked], folders=secret) as session:
                    session.ask(("run", next(iter(asked.values())).imports, False))
                    for index, (cell, own) in enumerate(given):
                        if index not in skipped | left_out:
                            bound = session.ask(("run", cell, own)).get("bound", [])
                            for name in (n for n in asked if n in bound and (n, index) not in ended):
                                _judge(result, name, session, checks[name], asked[name])
                            name = ""
                    index = len(given)
                    for name in (n for n in asked if not result.passes(n) and n not in dict(ended)):
                        if result.words[name] != exercises.OPEN:  # it may need what was defined below it
                            _judge(result, name, session, checks[name], asked[name])
                    return
            except Gone as how:
                if name:
                    ended.add((name, index))
                    result.words[name] = f"Not yet: the answer {how}."
                elif index < 0:
                    result.notes.append(f"the notebook {how} before its first cell")
                    return
                else:
                    left_out.add(index)
                    result.notes.append(f"code cell {index + 1} {how}, and was left out")
    result.notes.append(f"it was begun {STARTS} times, and each time ended early")


def _judge(result: Graded, name: str, session: Session, check: tuple, task: Task) -> None:
    if result.passes(name):
        return
    reference, cases, options = check
    verdict = exercises.judge(session.function(name), reference, cases, **options)
    if verdict.status != "open" or result.words[name] == exercises.OPEN:
        result.words[name] = verdict.message
    result.points[name] = task.points if verdict else 0


def _apart(pipe, *given) -> None:
    pipe.send(grade(*given))


def grade_apart(*given) -> Graded:
    """`grade` in a process of its own, so that whatever happens there concerns one student alone."""
    if given[1] is None or not readable(given[1]):  # there is nothing to run
        return grade(*given)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(there, *given), daemon=False)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return Graded(given[0], notes=["grading this notebook failed; look at it by hand"])
    finally:
        process.terminate()
        process.join()


def limit_of(name: str) -> float:
    """Seconds for a cell: four times what the whole chapter takes on a quiet machine, at least three minutes."""
    return max(180.0, 4.0 * read_times().get(name, {}).get("notebook", 45))


def handed_in(folder: Path, student: str, name: str) -> Path | None:
    """The notebook that a student handed in: of that name, or the only one that begins with it."""
    place = folder / "submitted" / student / name
    if (path := place / f"{name}.ipynb").exists():
        return path
    others = [*place.glob("*.ipynb"), *(folder / "submitted" / student).glob(f"{name}*.ipynb")]
    return others[0] if len(others) == 1 else None


def grade_course(folder: Path | str, jobs: int = 0, limit: float = 0, names: list[str] | None = None) -> Iterator[str]:
    """Grade all (or the named) assignments of a course folder; yields a line for each student and each table written.

    Raises ValueError when the folder is not a course's or holds an assignment that cannot be graded.
    """
    import nbformat

    folder = Path(folder).resolve()
    sources = {path.stem: path for path in sorted(folder.glob("source/*/*.ipynb")) if path.stem == path.parent.name}
    sources = {name: path for name, path in sources.items() if not names or name in names}
    students = sorted(path.name for path in folder.glob("submitted/*") if path.is_dir())
    if not sources or not students:
        raise ValueError(
            f"{folder} should hold source/01_attention/01_attention.ipynb, as `make assignment` writes it, "
            "and submitted/STUDENT/01_attention/01_attention.ipynb"
        )
    for name, source in sources.items():
        try:
            asked = tasks(nbformat.read(source, as_version=4))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        seeds = tuple(secrets.randbelow(2**31) for _ in range(3))
        one = lambda student, n=name, s=source, d=seeds: grade_apart(
            student, handed_in(folder, student, n), s, limit or limit_of(n), d
        )
        with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            results = []
            for result in pool.map(one, students):
                results.append(result)
                yield f"{name} {result.student}: {sum(result.points.values())} of {sum(t.points for t in asked)}"
                target = folder / "feedback" / result.student / name / f"{name}.html"
                target.parent.mkdir(parents=True, exist_ok=True)
                write(target, feedback(result, asked, name))
        table = folder / "grades" / f"{name}.csv"
        table.parent.mkdir(exist_ok=True)
        write(table, grades(results, asked))
        yield str(table)


def grades(results: list[Graded], asked: list[Task]) -> str:
    """The table of one assignment, as CSV: student, points, of, one column for each exercise, notes."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["student", "points", "of", *(task.name for task in asked), "notes"])
    for result in results:
        points = [result.points.get(task.name, 0) for task in asked]
        notes = "; ".join(result.notes)
        table.writerow([result.student, sum(points), sum(task.points for task in asked), *points, notes])
    return text.getvalue()


def feedback(result: Graded, asked: list[Task], name: str) -> str:
    """What a student may read: her points, the words of each check and her own answers; nothing of the tests."""
    points = sum(result.points.values())
    parts = [f"<h1>{html.escape(name)}: {points} of {sum(task.points for task in asked)} points</h1>"]
    for task in asked:
        parts.append(f"<h2>{html.escape(task.title)}: {result.points.get(task.name, 0)} of {task.points}</h2>")
        parts.append(f"<p>{html.escape(result.words.get(task.name, 'It could not be graded.'))}</p>")
        if result.answers.get(task.name):
            parts.append(f"<pre>{html.escape(result.answers[task.name])}</pre>")
    parts += [f"<p>{html.escape(note)}.</p>" for note in result.notes]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
    style = "<style>body{max-width:45em;margin:2em auto;padding:0 1em;font:1em/1.5 sans-serif}"
    style += "pre{white-space:pre-wrap}</style>"
    return "\n".join([head + style, "<main>", *parts, "</main></html>"])

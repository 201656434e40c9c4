"""Rules on the notebook as a file: executed, calm, stable, small."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.house.rules import Chapter, add, chapter_rule, code_cell, notebook, prints, texts, where
from tfkit.authoring.checking import read_times, record


@chapter_rule(
    "run `make run NB=<number>`, which executes the whole notebook from the top and stores it",
    notebook(lambda cells: cells[-1].update(execution_count=7)),
)
def executed(chapter: Chapter) -> Iterator[str]:
    """Every code cell is executed, in order."""
    for expected, cell in enumerate(chapter.code, 1):
        if not cell["source"].strip():
            yield f"{where(cell)} is empty; delete it"
            return
        if cell["execution_count"] != expected:
            yield f"{where(cell)} has execution count {cell['execution_count']} where {expected} is expected"
            return


@chapter_rule(
    "mend the code, or filter the warning where it arises with a comment that says why; then `make run`",
    add("x", prints("oh", "stderr")),
)
def calm_outputs(chapter: Chapter) -> Iterator[str]:
    """No errors, nothing on the error stream, no warnings."""
    for cell in chapter.code:
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"{where(cell)} stored an error: {output['ename']}: {output['evalue'][:80]}"
            elif output.get("name") == "stderr":
                yield f"{where(cell)} wrote to stderr: {texts(output).strip()[:80]!r}"
            elif found := re.search(r"\w*Warning:.*", texts(output)):
                yield f"{where(cell)} shows a warning: {found[0][:80]!r}"


UNSTABLE = {
    "a memory address": r"\b0x[0-9a-fA-F]{5,}",
    "a display handle": r"display_id=\w+",
    "an absolute path": r"(?<![\w./:<])/(?:home|root|usr|tmp|opt|var|mnt|work\w*|Users)/|\b[A-Z]:\\\w|site-packages",
    "a version": r"(?<![\d.])\d+\.\d+\.\d+(?:\+\w+)?(?![\d.])",
}


@chapter_rule(
    "print what is stable: a shape, a rounded number, a name; then `make run`",
    add("x", prints("<object at 0x7f3a2b1c>")),
)
def stable_outputs(chapter: Chapter) -> Iterator[str]:
    """No output that differs from machine to machine."""
    for cell in chapter.code:
        for output in cell["outputs"]:
            for what, pattern in UNSTABLE.items():
                if found := re.search(pattern, texts(output)):
                    yield f"{where(cell)} prints {what}: {found[0]!r}"
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                yield f"{where(cell)} stored a live widget, which only you can see; `make run` stores its picture"


@chapter_rule(
    "show pictures with tfkit.show(fig, alt='what there is to see'); write ![what there is to see](...) in prose",
    add("x", {"output_type": "display_data", "data": {"image/png": ""}, "metadata": {}}),
)
def pictures_described(chapter: Chapter) -> Iterator[str]:
    """Every picture has an alt text, and there is at least one picture."""
    count = 0
    for cell in chapter.code:
        for output in cell["outputs"]:
            for mime in output.get("data", {}):
                if mime.startswith("image/"):
                    count += 1
                    if len(output["metadata"].get(mime, {}).get("alt", "").split()) < 3:
                        yield f"{where(cell)} shows a picture without alt text"
            if re.search(r"<img(?![^>]*\balt=.\w)", texts(output)):
                yield f"{where(cell)} shows an <img> without alt text"
    for cell in chapter.prose:
        if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=.\w)", cell["source"]):
            yield f"{where(cell)} has an image without alt text"
    if not count:
        yield "there is no picture; a chapter has at least one that carries meaning"


@chapter_rule(
    "fewer or smaller pictures (tfkit.show reduces them to 80 dpi and 256 colors), shorter printed output",
    add("x", prints("9 " * 240_000)),
)
def small_file(chapter: Chapter) -> Iterator[str]:
    if (size := chapter.path.stat().st_size / 1024) > 450:
        yield f"the notebook has {size:.0f} KB; at most 450 KB are allowed"


@chapter_rule(
    "split the cell: one concept each, shown at once; move what is not the point into an earlier cell",
    add("x = 1\n" * 46),
)
def short_cells(chapter: Chapter) -> Iterator[str]:
    """No code cell above 45 lines, nine in ten under 25 (blank lines do not count)."""
    sizes = {where(c): sum(bool(line.strip()) for line in c["source"].splitlines()) for c in chapter.code}
    yield from (f"{cell} has {size} lines; at most 45 are allowed" for cell, size in sizes.items() if size > 45)
    long = [f"{cell}: {size}" for cell, size in sizes.items() if size >= 25]
    if len(long) > len(chapter.code) / 10:
        yield f"{len(long)} of {len(chapter.code)} code cells have 25 lines or more ({'; '.join(long)}); a tenth may"


@chapter_rule("break the line after a comma or an opening bracket", add("x = '" + "long " * 20 + "'"))
def narrow_lines(chapter: Chapter) -> Iterator[str]:
    """At most 88 columns in code cells."""
    for cell in chapter.code:
        long = [str(i) for i, line in enumerate(cell["source"].splitlines(), 1) if len(line) > 88]
        if long:
            yield f"{where(cell)} has more than 88 columns in line {', '.join(long)}"


@chapter_rule(
    "say why before how: put a few sentences before the code that lacks them",
    notebook(lambda cells: cells.extend(code_cell("1 + 1", count=i) for i in range(30, 80))),
)
def more_prose_than_code(chapter: Chapter) -> Iterator[str]:
    if len(chapter.prose) < len(chapter.code):
        yield f"{len(chapter.prose)} Markdown cells for {len(chapter.code)} code cells; at least as many are wanted"


@chapter_rule(
    'add "reason": "..." to the cell\'s metadata, or better: make the output stable and drop the tag',
    add("x", tags=["nbval-ignore-output"]),
)
def reasons_for_tags(chapter: Chapter) -> Iterator[str]:
    """A cell whose output is not compared says why."""
    for cell in chapter.code:
        ignoring = {"nbval-ignore-output", "nbval-skip", "raises-exception"} & set(cell["metadata"].get("tags", []))
        if (ignoring or re.search(r"^# *NBVAL_", cell["source"], re.M)) and len(
            cell["metadata"].get("reason", "").split()
        ) < 3:
            yield f"{where(cell)} is exempt from comparison ({', '.join(ignoring) or 'NBVAL comment'}) without a reason"


@chapter_rule(
    "run `make times NB=<number>`; when it costs too much, train smaller, draw less, test on smaller shapes",
    lambda root: record({"01_attention": {"notebook": 36, "tests": 10}}, root),
)
def budget(chapter: Chapter) -> Iterator[str]:
    """Notebook and tests together cost at most 45 seconds of processor time; 35 are the aim."""
    spent = read_times(chapter.root).get(chapter.name)
    if spent is None:
        yield "notebooks/results/times.csv has no row of this chapter"
    elif sum(spent.values()) > 45:
        yield f"notebook and tests take {spent['notebook']:g} + {spent['tests']:g} s; at most 45 s are allowed"

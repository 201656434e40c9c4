"""Rules on the notebook as a text that is read from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.house.rules import Chapter, chapter_rule, headings, replace, texts, where


@chapter_rule(
    "order the headings as in other chapters; the first cell is '# Title' and a line 'Time: ... · needs chapters ...'",
    replace("What you will learn", "Overview"),
)
def sections(chapter: Chapter) -> Iterator[str]:
    """Title, time, what you will learn, setup, exercises, summary: in this order."""
    first = chapter.cells[0]
    if first["cell_type"] != "markdown" or not first["source"].startswith("# "):
        yield "the first cell is not a Markdown cell that starts with '# Title'"
    if not any(re.search(r"\bTime\b", c["source"]) for c in chapter.cells[:3] if c["cell_type"] == "markdown"):
        yield "the opening does not say how long the chapter takes ('Time')"
    heads, at = [h.lower() for c in chapter.cells for h in headings(c)], -1
    for wanted in ("what you will learn", "setup", "exercises", "summary"):
        found = [i for i, head in enumerate(heads) if wanted.rstrip("s") in head.replace("set-up", "setup") and i > at]
        if not found:
            yield f"there is no heading '{wanted.capitalize()}' " + ("after the one before it" if at >= 0 else "")
        else:
            at = found[0]


@chapter_rule("put `tfkit.set_seed(0)` into the setup cell", replace("tfkit.set_seed(0)", "pass"))
def seeded_setup(chapter: Chapter) -> Iterator[str]:
    cells = chapter.section("setup") or chapter.section("set-up")
    if not any("set_seed(0)" in c["source"] for c in cells if c["cell_type"] == "code"):
        yield "the section Setup does not call set_seed(0)"


FETCHES = (
    r"\b(?:from_pretrained|urlopen|urlretrieve|load_dataset|fetch_\w+|IFrame|requests\.get)\("
    r"|\btorch\.hub\b|download=True|url=[\"']http|(?m:^\s*(?:!|%(?:pip|conda)).*)"
)


@chapter_rule(
    "use tfkit.data, a package's own data, or a picture made in the notebook; a plain [link](https://...) is welcome",
    replace("Prose.", "![a nice picture](https://example.org/a.png)"),
)
def offline(chapter: Chapter) -> Iterator[str]:
    """Nothing is fetched, neither by running the notebook nor by looking at it."""
    for cell in chapter.cells:
        shown = cell["source"] if cell["cell_type"] == "markdown" else "\n".join(map(texts, cell["outputs"]))
        if found := re.search(
            r"!\[[^\]]*\]\(\s*<?(?:https?:)?//|<(?:img|script|iframe|link|video)\b[^>]*(?:src|href)=.?(?:https?:)?//",
            shown,
        ):
            yield f"{where(cell)} shows something remote: {found[0][:60]!r}"
        if cell["cell_type"] == "code" and (found := re.search(FETCHES, cell["source"])):
            yield f"{where(cell)} fetches or installs something: {found[0].strip()[:60]!r}"


@chapter_rule("write what the sentence asks for in its place", replace("Prose.", "Replace this: say why."))
def placeholders(chapter: Chapter) -> Iterator[str]:
    """Nothing is left of the text that `make chapter` lays out for the author."""
    for cell in chapter.cells:
        if found := re.search(r"replace this:[^\n]*", cell["source"], re.I):
            yield f"{where(cell)} still says {found[0][:60]!r}"

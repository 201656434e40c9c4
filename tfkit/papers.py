"""The papers of the course: what each one is, and what the notebooks have shown of it.

`papers.csv` holds facts alone. Everything else is read back from the stored outputs of the notebooks, so it cannot be
typed by hand: `paper(id)` prints a citation, its four verbs print one line each, and `collect()` reads those lines.
"""

from __future__ import annotations

import csv
import difflib
import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The chapters: beside tfkit in the checkout, inside it where it is installed.
NOTEBOOKS = HERE / "notebooks" if (HERE / "notebooks").is_dir() else HERE.parent / "notebooks"
VERBS = ("holds", "measures", "differs", "not here")


@dataclass(frozen=True)
class Paper:
    """The facts about one paper, and four ways to say what its chapter found.

    `holds` and `measures` raise AssertionError when what they claim is false; each verb prints one line, which
    `collect` finds again in the stored notebook.
    """

    id: str
    title: str
    year: int
    kind: str
    family: str
    chapter: str
    builds_on: str  # what the paper names as its parents, separated by "; "
    link: str

    def __str__(self) -> str:
        return f"{self.title} ({self.year})"

    @property
    def has_page(self) -> bool:
        """Whether `link` is the paper's own page, whose title was found equal; else it is a search for the title."""
        return "/search/" not in self.link

    def _say(self, verb: str, text: str) -> None:
        print(f"[{self.id}] {verb}: {text}")

    def holds(self, claim: str, ok) -> None:
        """State a claim that is true or false. `ok` is a bool, a 0-dimensional bool tensor or a contract's finding."""
        from tfkit.contracts import Finding

        dtype = str(getattr(ok, "dtype", ""))
        if not isinstance(ok, (bool, Finding)) and not (dtype in ("bool", "torch.bool") and ok.ndim == 0):
            raise TypeError(
                f"holds() takes one True or False, got {type(ok).__name__} {ok!r}; compare first, e.g. with "
                f"torch.allclose"
            )
        if not ok:
            found = f" ({ok})" if isinstance(ok, Finding) else ""
            raise AssertionError(f"[{self.id}] does not hold: {claim}{found}")
        self._say("holds", claim)

    def measures(
        self, claim: str, value: float | tuple[float, float], *, below: float = math.inf, above: float = -math.inf,
        unit: str = "", noise: float = 1e-6,
    ) -> None:  # fmt: skip
        """State a measured number together with the bound that it must keep: above < value < below.

        A ratio is given as its two terms, (a, b) for a / b. ValueError when b is no larger than `noise`, the level of
        rounding: over such a number every ratio is chance.
        """
        if isinstance(value, tuple):
            over, under = map(float, value)
            if not abs(under) > noise:  # also catches nan
                said = f"measures({claim!r}, ...): {over:.3g} over {under:.3g} is a ratio to rounding ({noise:g})"
                raise ValueError(f"{said}; measure the numbers themselves, or pass noise= for small units")
            value = over / under
        value = float(value)
        if below == math.inf and above == -math.inf:
            raise ValueError(f"measures({claim!r}, ...) needs a bound: below=, above= or both")
        bounds = [f"above {above:g}"] * (above > -math.inf) + [f"below {below:g}"] * (below < math.inf)
        text = f"{claim} \u27e8{value:.3g}{unit}\u27e9 ({' and '.join(bounds)})"
        if not above < value < below:  # also catches nan
            raise AssertionError(f"[{self.id}] does not measure: {text}")
        self._say("measures", text)

    def differs(self, how: str) -> None:
        """Say where the code departs from the paper."""
        self._say("differs", how)

    def not_here(self, reason: str, **numbers: float) -> None:
        """Say that a claim of the paper does not show at this size, with the numbers that were measured instead."""
        measured = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in numbers.items())
        angle = f" \u27e8{measured}\u27e9" if numbers else ""
        self._say("not here", reason + angle)


@functools.cache
def papers() -> dict[str, Paper]:
    """All papers of the course by id, in the order of the chapters."""
    with (HERE / "papers.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: Paper(**{**row, "year": int(row["year"])}) for row in csv.DictReader(file)}


@functools.cache
def chapters() -> dict[str, dict[str, str]]:
    """Chapter name ("11_linear_attention") to its title and the part of the course that it belongs to."""
    with (HERE / "chapters.csv").open(encoding="utf-8", newline="") as file:
        return {row["chapter"]: {"title": row["title"], "part": row["part"]} for row in csv.DictReader(file)}


def lookup(id: str) -> Paper:
    """The paper with this id. Raises KeyError that suggests the nearest ids."""
    if id not in papers():
        near = difflib.get_close_matches(id, papers(), n=3, cutoff=0.4)
        raise KeyError(f"no paper {id!r}; did you mean {' or '.join(map(repr, near))}?" if near else f"no paper {id!r}")
    return papers()[id]


def paper(id: str) -> Paper:
    """Look up a paper and print its citation; use the result to state what the chapter shows of it.

    Where the paper's own page is known, its address follows; JupyterLab makes it a link.

    >>> linformer = paper("linformer")
    [linformer] cites: Linformer: Self-Attention with Linear Complexity (2020), https://arxiv.org/abs/2006.04768
    """
    found = lookup(id)
    found._say("cites", f"{found}, {found.link}" if found.has_page else str(found))
    return found


@dataclass
class Record:
    """What the notebooks show of one paper, read from their stored outputs."""

    paper: Paper
    chapter: str = ""
    section: str = ""
    holds: list[str] = field(default_factory=list)
    measures: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    not_here: list[str] = field(default_factory=list)

    @property
    def taught(self) -> bool:
        return bool(self.chapter)

    @property
    def stands(self) -> bool:
        """Taught in its chapter, with at least one claim that holds."""
        return self.taught and bool(self.holds)

    @property
    def address(self) -> str:
        """The section as a link from the folder of notebooks ("01_attention.ipynb#By-hand"); "" before it is taught."""
        return f"{self.chapter}.ipynb#{self.section.replace(' ', '-')}" if self.taught else ""

    def card(self) -> str:
        """All that is known of the paper, as plain text: the facts, where it is taught, what was shown."""
        row = self.paper
        where = f"{self.chapter}, section {self.section!r}" if self.taught else f"planned for {row.chapter}"
        lines = [f"{row.title} ({row.year})", f"  id         {row.id}", f"  kind       {row.kind}, {row.family}"]
        lines += [f"  builds on  {row.builds_on}"] * bool(row.builds_on)
        lines += [f"  taught in  {where}", f"  link       {row.link}"]
        shown = {"holds": self.holds, "measures": self.measures, "differs": self.differs, "not here": self.not_here}
        return "\n".join(lines + [f"  {verb:9}  {claim}" for verb, claims in shown.items() for claim in claims])


_LINE = re.compile(r"^\[(\w+)\] (cites|holds|measures|differs|not here): (.*)$", re.M)


def collect(notebooks: Path | str = NOTEBOOKS) -> dict[str, Record]:
    """Read the stored outputs of all notebooks: where each paper is taught, what holds, what was measured."""
    records = {id: Record(found) for id, found in papers().items()}
    for path in sorted(Path(notebooks).glob("[0-9]*.ipynb")):
        section = ""
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                if headings := re.findall(r"^#{2,3} (.+)$", source, re.M):
                    section = headings[-1]
                continue
            printed = "".join("".join(out.get("text", "")) for out in cell.get("outputs", []))
            for id, verb, text in _LINE.findall(printed):
                if id not in records:
                    continue
                record = records[id]
                if verb == "cites":
                    if not record.taught and path.stem == record.paper.chapter:
                        record.chapter, record.section = path.stem, section
                else:
                    getattr(record, verb.replace(" ", "_")).append(text)
    return records


def search(query: str, records: dict[str, Record] | None = None) -> list[Record]:
    """The papers that contain every word of `query`, best first: a phrase in the title, then words there.

    A word matches where a word begins ("linear" finds "linearized"), case aside. No word at all finds every paper.
    """
    words = [re.compile(rf"(?<![^\W_]){re.escape(word)}", re.I) for word in query.split()]
    scored = []
    for record in (collect() if records is None else records).values():
        row = record.paper
        claims = " ".join([*record.holds, *record.measures, *record.differs, *record.not_here])
        rest = f"{row.kind} {row.family} {row.chapter} {row.year} {row.builds_on} {record.section} {claims}"
        score = 32 * bool(re.search(rf"(?<![^\W_]){re.escape(query.strip())}", row.title, re.I)) if words else 0
        for word in words:
            found = (8 * bool(word.search(row.id))) + (4 * bool(word.search(row.title))) + bool(word.search(rest))
            if not found:
                break
            score += found
        else:
            scored.append((-score, record))
    return [record for _, record in sorted(scored, key=lambda pair: pair[0])]


def coverage(records: dict[str, Record] | None = None) -> dict[str, tuple[int, int]]:
    """Chapter to (papers that stand, papers in all), for every chapter that has papers."""
    count: dict[str, tuple[int, int]] = {}
    for record in (collect() if records is None else records).values():
        stand, total = count.get(record.paper.chapter, (0, 0))
        count[record.paper.chapter] = (stand + record.stands, total + 1)
    return count

"""`make reseed NB=03 SEEDS=5`: does a chapter still hold what it says when every seed in it is another one?

The notebook runs once per shift in a kernel of its own in which `shift` has moved every seed that torch, NumPy and
Python are given. A claim that is false there is counted instead of raised, so that one run judges all of them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from tfkit.authoring.files import ROOT, write
from tfkit.authoring.notebooks import ENVIRONMENT

TABLE = ROOT / "notebooks" / "results" / "reseed.csv"
COLUMNS = ("chapter", "paper", "verb", "claim", "held", "seeds")
STEP = 1000  # between two shifts, beyond the seeds 0, 1, 2, ... over which a cell averages
CLAIMS: list[tuple[str, str, bool]] = []  # in the kernel: (paper, verb, is it true), in the order of the calls


def shift(by: int) -> None:
    """In this process, seed every generator with `by` more than it is asked to, and count claims in CLAIMS.

    Moved are the global generators, torch.Generator, numpy's default_rng, RandomState and Generator's bit generators,
    and random.Random: what a generator is made or seeded from, never what is drawn.
    """
    import numpy as np
    import torch

    def moved(function):
        def seeded(seed=None, *args, **kwargs):
            return function(seed + by if isinstance(seed, (int, np.integer)) else seed, *args, **kwargs)

        return seeded

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            super().manual_seed(seed + by)
            return self

    class RandomState(np.random.RandomState):
        def __init__(self, seed=None):
            super().__init__(seed + by if isinstance(seed, (int, np.integer)) else seed)

    class Random(random.Random):
        def seed(self, a=None, version=2):
            super().seed(a + by if isinstance(a, int) else a, version)

    torch.Generator, np.random.RandomState, random.Random = Generator, RandomState, Random
    torch.manual_seed = torch.random.manual_seed = moved(torch.manual_seed)
    np.random.seed, np.random.default_rng = moved(np.random.seed), moved(np.random.default_rng)
    random.seed = moved(random.seed)
    _count_claims()


def _count_claims() -> None:
    """Let Paper.holds and Paper.measures note a false claim instead of raising it."""
    from tfkit.papers import Paper

    def counted(verb: str, method):
        def state(self, *args, **kwargs):
            try:
                method(self, *args, **kwargs)
                CLAIMS.append((self.id, verb, True))
            except AssertionError:
                CLAIMS.append((self.id, verb, False))

        return state

    for verb in ("holds", "measures"):
        setattr(Paper, verb, counted(verb, getattr(Paper, verb)))


@dataclass
class Claim:
    """One line of `holds` or `measures` in a stored notebook, and under how many of the tried seeds it was true."""

    chapter: str
    paper: str
    verb: str
    claim: str
    held: int = 0
    seeds: int = 0

    def __str__(self) -> str:
        return f"{self.chapter} {self.paper} {self.verb}: {self.claim}: {self.held} of {self.seeds} seeds"


def stored_claims(notebook: Path) -> list[Claim]:
    """The claims that a notebook has stored, in the order in which they were printed."""
    found = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        printed = "".join("".join(out.get("text", "")) for out in cell.get("outputs", []))
        for paper, verb, text in re.findall(r"^\[(\w+)\] (holds|measures): (.*)$", printed, re.M):
            found.append(Claim(notebook.stem, paper, verb, re.sub(r" ?\u27e8.*?\u27e9", "", text)))
    return found


def judge(notebook: Path, by: int) -> tuple[list[tuple[str, str, bool]], list[str]]:
    """Run a notebook with every seed moved: (paper, verb, is it true) per claim that was met, and what stopped."""
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(notebook, as_version=4)
    before = nbformat.v4.new_code_cell(f"from tfkit.authoring import reseeding as _r\n_r.shift({by})")
    after = nbformat.v4.new_code_cell("import json\nprint('CLAIMS ' + json.dumps(_r.CLAIMS))")
    nb.cells = [before, *nb.cells, after]
    os.environ.update(ENVIRONMENT)
    place = {"metadata": {"path": str(notebook.parent)}}
    NotebookClient(nb, timeout=600, kernel_name="python3", resources=place, allow_errors=True).execute()
    stopped = [
        f"cell {number - 1}: {out['ename']}: {out['evalue'][:120]}"
        for number, cell in enumerate(nb.cells)
        for out in cell.get("outputs", [])
        if out["output_type"] == "error"
    ]
    said = "".join(out.get("text", "") for out in nb.cells[-1].outputs)
    return [tuple(claim) for claim in json.loads(said.split("CLAIMS ", 1)[1])], stopped


def reseed(notebook: Path, seeds: int = 5) -> tuple[list[Claim], list[str]]:
    """Run a chapter under `seeds` shifts; its claims with their counts, and what else stopped.

    A claim is counted as false where it was not reached. Raises ValueError when `seeds` is below 1 or the notebook has
    stored no claims.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    claims, troubles = stored_claims(notebook), []
    if not claims:
        raise ValueError(f"{notebook.name} has stored no claims; `make run` stores them")
    for number in range(1, seeds + 1):
        met, stopped = judge(notebook, STEP * number)
        troubles += [f"{notebook.stem} with seeds moved by {STEP * number}: {line}" for line in stopped]
        places: dict[tuple[str, str], list[Claim]] = {}
        for claim in claims:
            claim.seeds += 1
            places.setdefault((claim.paper, claim.verb), []).append(claim)
        for paper, verb, true in met:
            waiting = places.get((paper, verb), [])
            if waiting:
                waiting.pop(0).held += true
    return claims, troubles


def read_table(root: Path = ROOT) -> list[Claim]:
    """The stored counts."""
    path = root / TABLE.relative_to(ROOT)
    if not path.exists():
        return []
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    return [Claim(**{**row, "held": int(row["held"]), "seeds": int(row["seeds"])}) for row in rows]


def record(claims: list[Claim], root: Path = ROOT) -> None:
    """Replace the rows of these claims' chapters in the table."""
    chapters = {claim.chapter for claim in claims}
    kept = [claim for claim in read_table(root) if claim.chapter not in chapters]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for claim in sorted([*kept, *claims], key=lambda claim: claim.chapter):  # stable: claims keep their order
        rows.writerow([getattr(claim, name) for name in COLUMNS])
    path = root / TABLE.relative_to(ROOT)
    path.parent.mkdir(exist_ok=True)
    write(path, text.getvalue())

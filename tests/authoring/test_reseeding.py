"""Seeds that are moved, and claims that are counted instead of raised."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tfkit.authoring import notebooks, reseeding

DRAWS = """
import json, random, sys
import numpy as np, torch
if by := int(sys.argv[1]):
    from tfkit.authoring import reseeding
    reseeding.shift(by)
start = int(sys.argv[2])
from sklearn.utils import check_random_state
torch.manual_seed(start); np.random.seed(start); random.seed(start)
print(json.dumps([
    torch.rand(1).item(), np.random.rand(), random.random(),
    torch.rand(1, generator=torch.Generator().manual_seed(start)).item(),
    np.random.default_rng(start).random(), np.random.RandomState(start).rand(), random.Random(start).random(),
    check_random_state(start).rand(), isinstance(torch.Generator(), torch.Generator),
]))
torch.seed(); np.random.default_rng(); random.Random(); np.random.RandomState(); np.random.default_rng([1, 2])
"""


def draws(by, start):
    command = [sys.executable, "-c", DRAWS, str(by), str(start)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


def test_every_generator_is_moved_and_by_the_same():
    assert draws(3, 4) == draws(0, 7)
    assert all(a != b for a, b in zip(draws(3, 4)[:-1], draws(0, 4)[:-1], strict=True))


LUCKY = """import torch
from tfkit.papers import paper

generator = torch.Generator().manual_seed(0)
here = paper("linformer")
here.holds("one is one", True)
here.measures("a seed is small", generator.initial_seed(), below=1500)
here.holds("the seed is even", generator.initial_seed() % 2 == 0)"""


@pytest.fixture
def lucky(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "tfkit" / "zoo").mkdir(parents=True)
    path = tmp_path / "notebooks" / "11_linear_attention.ipynb"
    cells = [new_code_cell(LUCKY), new_code_cell("assert generator.initial_seed() < 2500"), new_code_cell("x = 1")]
    nbformat.write(new_notebook(cells=cells), path)
    notebooks.run(path)
    return path


def test_a_lucky_seed_is_counted(lucky):
    stored = lucky.read_text(encoding="utf-8")
    claims, stopped = reseeding.reseed(lucky, seeds=3)
    assert [(claim.claim, claim.held, claim.seeds) for claim in claims] == [
        ("one is one", 3, 3),
        ("a seed is small (below 1500)", 1, 3),
        ("the seed is even", 3, 3),
    ]
    assert str(claims[1]) == "11_linear_attention linformer measures: a seed is small (below 1500): 1 of 3 seeds"
    assert len(stopped) == 1 and "moved by 3000: cell 1: AssertionError" in stopped[0]
    assert lucky.read_text(encoding="utf-8") == stored

    root = lucky.parents[1]
    reseeding.record([reseeding.Claim("01_attention", "transformer", "holds", "a, b", 2, 2)], root)
    reseeding.record(claims, root)
    reseeding.record(claims, root)
    kept = reseeding.read_table(root)
    assert [claim.chapter[:2] for claim in kept] == ["01", "11", "11", "11"] and kept[1:] == claims


def test_what_cannot_be_judged_is_refused(lucky, tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        reseeding.reseed(lucky, 0)
    bare = tmp_path / "90_bare.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1")]), bare)
    with pytest.raises(ValueError, match="90_bare.ipynb has stored no claims"):
        reseeding.reseed(bare)

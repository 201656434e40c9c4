"""Every rule of the house, on the house; and each rule on a small house that breaks it."""

import shutil
import socket
from pathlib import Path

import pytest

from tests.house import sample as small
from tests.house.exempt import EXEMPT, exempt
from tests.house.on_code import arrows_between_chapters, few_arguments, slots_not_flags
from tests.house.on_files import calm_outputs, pictures_described, stable_outputs
from tests.house.on_masks import one_notation_for_masks
from tests.house.on_project import arrows_between_packages
from tests.house.on_teaching import walls
from tests.house.on_text import offline
from tests.house.rules import (
    CHAPTER_RULES,
    HOUSE_RULES,
    ROOT,
    Chapter,
    add,
    chapter,
    code_cell,
    notebook,
    notebooks,
    prints,
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    return small.build(tmp_path_factory.mktemp("sample") / "house")


def report(name: str, rules: dict, *given) -> None:
    rule, mend, _ = rules[name]
    problems = list(rule(*given))
    assert not problems, "\n  ".join([f"{name.replace('_', ' ')}: {mend}", *problems])


@pytest.mark.parametrize("name", CHAPTER_RULES)
@pytest.mark.parametrize("path", notebooks(ROOT), ids=lambda path: path.stem)
def test_chapter(path, name):
    if name not in exempt(path.stem):
        report(name, CHAPTER_RULES, chapter(ROOT, path))
    elif not list(CHAPTER_RULES[name][0](chapter(ROOT, path))):
        pytest.fail(f"{path.stem} now keeps the rule {name}: take {name} from its lines in tests/house/exempt.py")


def test_only_the_chapters_that_stood_before_a_rule_are_exempt_from_it():
    """New chapters are bound by every rule from the first day."""
    old = {*(f"{n:02}" for n in range(18)), *(f"{n}" for n in range(70, 76)), "90", "99"}
    appendix = {"98"}  # a gallery with few exercises
    costly = {"20", "21", "22", "23"}  # vision chapters whose cost is still to be cut; times.csv says what it is
    assert {name[:2] for name in EXEMPT} <= old | appendix | costly, "a new chapter keeps every rule"
    assert all(exempt(name) == {"budget"} for name in EXEMPT if name[:2] in costly)
    unknown = {rule for name in EXEMPT for rule in exempt(name)} - set(CHAPTER_RULES)
    assert not unknown, f"tests/house/exempt.py names rules that do not exist: {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("name", HOUSE_RULES)
def test_house(name):
    report(name, HOUSE_RULES, ROOT)


@pytest.mark.parametrize("name", [*CHAPTER_RULES, *HOUSE_RULES])
def test_rule_accepts_a_good_house(sample, name):
    if name in CHAPTER_RULES:
        report(name, CHAPTER_RULES, Chapter(sample, notebooks(sample)[0]))
    else:
        report(name, HOUSE_RULES, sample)


@pytest.mark.parametrize("name", [*CHAPTER_RULES, *HOUSE_RULES])
def test_rule_finds_what_breaks_it(sample, tmp_path, name):
    rule, _, breaks = CHAPTER_RULES.get(name) or HOUSE_RULES[name]
    house = shutil.copytree(sample, tmp_path / "house")
    breaks(house)
    assert list(rule(Chapter(house, notebooks(house)[0]) if name in CHAPTER_RULES else house)), (
        f"{name} does not see it"
    )


def test_tests_cannot_reach_the_network():
    with socket.socket() as outside, pytest.raises(OSError, match="offline"):
        outside.connect(("192.0.2.1", 80))


BAD_OUTPUTS = {
    "an error": (calm_outputs, {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}),
    "a warning": (calm_outputs, prints("UserWarning: deprecated")),
    "a path": (stable_outputs, prints("saved to /home/reader/x.pt")),
    "a version": (stable_outputs, prints("torch 2.13.0+cpu")),
    "a widget": (
        stable_outputs,
        {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}, "metadata": {}},
    ),
    "a remote image": (
        offline,
        {
            "output_type": "display_data",
            "data": {"text/html": "<img alt='a cat' src='https://example.org/c.png'>"},
            "metadata": {},
        },
    ),
    "an <img> without alt": (
        pictures_described,
        {"output_type": "display_data", "data": {"text/html": "<img src='c.png'>"}, "metadata": {}},
    ),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_output_is_found(sample, tmp_path, name):
    rule, output = BAD_OUTPUTS[name]
    house = shutil.copytree(sample, tmp_path / "house")
    add("x", output)(house)
    assert list(rule(Chapter(house, notebooks(house)[0])))


BAD_CODE = {
    "!pip install einops": offline,
    "model = AutoModel.from_pretrained('gpt2')": offline,
    "from . import attention": arrows_between_chapters,
    "import tfkit.zoo.attention": arrows_between_chapters,
    "from tfkit.zoo.nowhere import x": arrows_between_chapters,
    "#| export\nimport transformers": arrows_between_chapters,
    "#| export\nclass A:\n    'A.'\n    def __init__(self, a, b, c, d, e, f, g, *, h, i): ...": few_arguments,
    "#| export\n@dataclass\nclass A:\n    'A.'\n    causal: bool": slots_not_flags,
    "#| export\ndef f(x, causal=False):\n    'F.'": slots_not_flags,
    "scores.masked_fill_(self.causal, -1e9)": one_notation_for_masks,
    "torch.where(mask.unsqueeze(1), -torch.inf, scores)": one_notation_for_masks,
    "layer(x, src_key_padding_mask=real)": one_notation_for_masks,
    "causal = torch.ones(n, n, dtype=torch.bool).triu(1)": one_notation_for_masks,
    "mask = torch.triu(torch.ones(n, n), diagonal=1)": one_notation_for_masks,
}
GOOD_CODE = {
    "import transformers": arrows_between_chapters,
    "#| export\nimport math\nfrom kernels import norms\nimport tfkit.data": arrows_between_chapters,
    "#| export\ndef f(a, b, c, d, e, f, g, h, *args, **options):\n    'F.'": few_arguments,
    "#| export\ndef f(x, bias: bool = True, mask: Bool[Tensor, 'n m'] | None = None):\n    'F.'": slots_not_flags,
    "scores.masked_fill(~mask, -torch.inf)": one_notation_for_masks,
    "scores.masked_fill(mask.logical_not(), -torch.inf)": one_notation_for_masks,
    "torch.where(mask, scores, -torch.inf)": one_notation_for_masks,
    "layer(x, src_key_padding_mask=~real)": one_notation_for_masks,
    "causal = torch.ones(n, n, dtype=torch.bool).tril()": one_notation_for_masks,
    "mask = ~torch.ones(n, n, dtype=torch.bool).triu(1)": one_notation_for_masks,
}


@pytest.mark.parametrize("source", BAD_CODE)
def test_bad_code_is_found(sample, tmp_path, source):
    house = shutil.copytree(sample, tmp_path / "house")
    add(source)(house)
    assert list(BAD_CODE[source](Chapter(house, notebooks(house)[0])))


@pytest.mark.parametrize("source", GOOD_CODE)
def test_good_code_is_accepted(sample, tmp_path, source):
    house = shutil.copytree(sample, tmp_path / "house")
    add(source)(house)
    assert not list(GOOD_CODE[source](Chapter(house, notebooks(house)[0])))


@pytest.mark.parametrize("line", ["from tfkit.authoring import files", "from .authoring.files import write"])
def test_only_the_makefile_and_tests_use_authoring(sample, tmp_path, line):
    house = shutil.copytree(sample, tmp_path / "house")
    (house / "tfkit" / "small.py").write_text(line + "\n")
    assert any("tfkit.authoring" in problem for problem in arrows_between_packages(house))


@pytest.mark.parametrize(
    "cells, found",
    [
        (["x = 1"] * 2, False),
        (["x = [\n" + "    1,\n" * 28 + "]", "x = [\n" + "    1,\n" * 27 + "]"], False),
        (["x = [\n" + "    1,\n" * 28 + "]"] * 2, True),
        (["x = 1"] * 3, True),
    ],
)
def test_walls_are_counted_in_cells_and_in_lines(sample, tmp_path, cells, found):
    """The sample ends with one silent cell."""
    house = shutil.copytree(sample, tmp_path / "house")
    notebook(lambda nb: nb.extend(code_cell(source) for source in cells))(house)
    assert bool(list(walls(Chapter(house, notebooks(house)[0])))) is found


def test_engineering_may_be_skipped(sample, tmp_path):
    house = shutil.copytree(sample, tmp_path / "house")
    head = {"cell_type": "markdown", "id": "h", "source": "### Engineering: in one pass", "metadata": {}}
    end = {"cell_type": "markdown", "id": "i", "source": "## Then", "metadata": {}}
    notebook(lambda nb: nb.extend([head, *(code_cell("x = 1") for _ in range(9)), end, code_cell("y = 1")]))(house)
    assert not list(walls(Chapter(house, notebooks(house)[0])))
    notebook(lambda nb: nb.extend(code_cell("x = 1") for _ in range(3)))(house)
    assert list(walls(Chapter(house, notebooks(house)[0])))


def test_a_rule_says_what_it_found_and_how_to_mend_it(sample, tmp_path):
    house = shutil.copytree(sample, tmp_path / "house")
    CHAPTER_RULES["exercise_kinds"][2](house)
    with pytest.raises(AssertionError) as told:
        report("exercise_kinds", CHAPTER_RULES, Chapter(house, notebooks(house)[0]))
    assert "0 exercises are of the kind 'on paper'; at least 1 wanted" in str(told.value)
    assert "have four exercises or more" in str(told.value)
    assert all(len(mend.split()) >= 3 for _, mend, _ in [*CHAPTER_RULES.values(), *HOUSE_RULES.values()])

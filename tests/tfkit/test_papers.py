"""The table of papers, the four verbs, and the collector that reads them back from notebooks."""

import io
import math
import re

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tfkit import papers as P
from tfkit.contracts import Finding

LEFT, RIGHT = "\u27e8", "\u27e9"


@pytest.fixture
def linformer(capsys):
    found = P.paper("linformer")
    assert capsys.readouterr().out == f"[linformer] cites: {found.title} ({found.year}), {found.link}\n"
    return found


def test_a_paper_whose_page_is_not_known_is_cited_without_an_address(capsys):
    P.paper("introduction")
    assert not P.papers()["introduction"].has_page and "http" not in capsys.readouterr().out


def test_pages_of_papers_are_identifiers_of_their_year():
    pages = [row for row in P.papers().values() if row.has_page]
    assert len(pages) > 100 and len({row.link for row in pages}) == len(pages)
    for row in pages:
        found = re.fullmatch(r"https://arxiv\.org/abs/(\d\d)(0[1-9]|1[0-2])\.\d{4,5}", row.link)
        assert found and abs(2000 + int(found[1]) - row.year) <= 1, row


def test_every_row_is_complete():
    rows = (P.HERE / "papers.csv").read_text(encoding="utf-8").splitlines()[1:]
    table = P.papers()
    assert len(rows) == len(table)  # as many lines as ids: the ids are unique
    for id, row in table.items():
        assert id == row.id and id.isidentifier() and id == id.lower(), id
        assert row.title and row.kind and row.family, id
        assert 1990 <= row.year <= 2030 and row.link.startswith("https://"), id
        assert row.chapter in P.chapters(), f"{id}: no chapter {row.chapter!r} in chapters.csv"


def test_chapters_are_numbered_in_order():
    names = list(P.chapters())
    assert names == sorted(names) and len({name[:2] for name in names}) == len(names)
    assert all(about["title"] and about["part"] for about in P.chapters().values())
    order = [row.chapter for row in P.papers().values()]
    assert order == sorted(order)


@pytest.mark.parametrize(
    "typo, meant", [("linfomer", "linformer"), ("Linformer", "linformer"), ("introducton", "introduction")]
)
def test_a_typo_is_answered_with_the_nearest_id(typo, meant):
    with pytest.raises(KeyError, match=f"no paper '{typo}'; did you mean .*'{meant}'"):
        P.paper(typo)


def test_nothing_near_gives_no_suggestion():
    with pytest.raises(KeyError) as caught:
        P.lookup("@@@@")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("ok", [True, torch.tensor(True), np.bool_(True), Finding(True, "seen")])
def test_holds_prints_one_line(linformer, capsys, ok):
    linformer.holds("it is linear", ok)
    assert capsys.readouterr().out == "[linformer] holds: it is linear\n"


@pytest.mark.parametrize("ok", [False, torch.tensor(False), np.bool_(False), Finding(False, "leaks at 3")])
def test_holds_raises_when_false(linformer, capsys, ok):
    with pytest.raises(AssertionError, match="linformer.*does not hold: it is linear") as caught:
        linformer.holds("it is linear", ok)
    assert capsys.readouterr().out == ""
    assert ("leaks at 3" in str(caught.value)) == isinstance(ok, Finding)


@pytest.mark.parametrize("ok", [1, 0.0, "yes", None, [True], torch.tensor([True, True]), torch.tensor(1.0)])
def test_holds_takes_only_a_truth_value(linformer, ok):
    with pytest.raises(TypeError, match="one True or False"):
        linformer.holds("it is linear", ok)


def test_measures_prints_the_number_in_angle_brackets(linformer, capsys):
    linformer.measures("slope", 1.0625, below=1.25)
    linformer.measures("share", torch.tensor(0.5), above=0.25, below=0.75, unit=" s")
    linformer.measures("gain", np.float32(3), above=2)
    assert capsys.readouterr().out.splitlines() == [
        f"[linformer] measures: slope {LEFT}1.06{RIGHT} (below 1.25)",
        f"[linformer] measures: share {LEFT}0.5 s{RIGHT} (above 0.25 and below 0.75)",
        f"[linformer] measures: gain {LEFT}3{RIGHT} (above 2)",
    ]


@pytest.mark.parametrize("value", [2, 5, math.nan, -math.inf])
def test_measures_raises_outside_its_bound_and_for_nan(linformer, capsys, value):
    with pytest.raises(AssertionError, match="does not measure: slope"):
        linformer.measures("slope", value, below=2, above=0)
    if value != 5:  # a bound itself is outside
        with pytest.raises(AssertionError, match="does not measure: slope"):
            linformer.measures("slope", value, above=2)
    assert capsys.readouterr().out == ""


def test_measures_needs_a_bound(linformer):
    with pytest.raises(ValueError, match="needs a bound"):
        linformer.measures("slope", 1.0)


def test_differs_and_not_here_print_one_line(linformer, capsys):
    linformer.differs("one shared projection")
    linformer.not_here("too small")
    linformer.not_here("too small", accuracy_gain=0.01234, loss=2)
    assert capsys.readouterr().out.splitlines() == [
        "[linformer] differs: one shared projection",
        "[linformer] not here: too small",
        f"[linformer] not here: too small {LEFT}accuracy gain 0.0123, loss 2{RIGHT}",
    ]


def test_collect_reads_what_stored_outputs_say(tmp_path):
    def said(*lines):
        text = "".join(f"{line}\n" for line in lines)
        return new_code_cell("...", outputs=[new_output("stream", name="stdout", text=text)])

    home = P.lookup("linformer").chapter
    notebook = new_notebook(cells=[
        new_markdown_cell("# Title\n\n## Before"),
        new_markdown_cell("### Linformer\n\nText."),
        said("hello", "[linformer] cites: Linformer (2020)"),
        new_markdown_cell("no heading here"),
        said("[linformer] holds: one", f"[linformer] measures: slope {LEFT}1.1{RIGHT} (below 2)"),
        said("[linformer] differs: shared", f"[linformer] not here: tiny {LEFT}x 1{RIGHT}", "[linformer] holds: two"),
        new_markdown_cell("## Later"),
        said("[linformer] cites: again", "[unknown] holds: nothing", "text [linformer] holds: not at the start"),
        new_code_cell("", outputs=[new_output("display_data", data={"text/plain": "[linformer] holds: not printed"})]),
    ])  # fmt: skip
    nbformat.write(notebook, tmp_path / f"{home}.ipynb")
    elsewhere = said("[introduction] cites: x", "[introduction] holds: y", "[linformer] holds: three")
    nbformat.write(new_notebook(cells=[elsewhere]), tmp_path / "99_elsewhere.ipynb")
    nbformat.write(new_notebook(cells=[said("[linformer] holds: a draft")]), tmp_path / "draft.ipynb")

    records = P.collect(tmp_path)
    assert set(records) == set(P.papers())
    record = records["linformer"]
    assert record.taught and (record.chapter, record.section) == (home, "Linformer")
    assert record.holds == ["one", "two", "three"]
    assert record.measures == [f"slope {LEFT}1.1{RIGHT} (below 2)"]
    assert record.differs == ["shared"] and record.not_here == [f"tiny {LEFT}x 1{RIGHT}"]
    other = records["introduction"]
    assert not other.taught and other.holds == ["y"]  # cited outside its own chapter: not taught there


def test_collect_finds_what_the_verbs_print(tmp_path, linformer, capsys):
    linformer.holds("a", True)
    linformer.measures("b", 1, below=2)
    linformer.differs("c")
    linformer.not_here("d", e=1)
    printed = capsys.readouterr().out
    cell = new_code_cell("...", outputs=[new_output("stream", name="stdout", text=printed)])
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "01_any.ipynb")
    record = P.collect(tmp_path)["linformer"]
    assert [len(part) for part in (record.holds, record.measures, record.differs, record.not_here)] == [1, 1, 1, 1]


# --- search, coverage, the terminal


def test_search_finds_every_word_and_the_phrase_first():
    found = P.search("linear attention", P.collect())
    titles = [record.paper.title.lower() for record in found]
    assert titles and "linear attention" in titles[0]
    first_without = next(i for i, title in enumerate(titles) if "linear attention" not in title)
    assert not any("linear attention" in title for title in titles[first_without:])
    assert P.search("linformer")[0].paper.id == "linformer"
    assert len(P.search("")) == len(P.papers())
    assert P.search("linformer zebra") == []
    assert "linformer" not in [record.paper.id for record in P.search("former")]  # a word matches at its beginning


def test_search_finds_words_of_claims():
    record = P.Record(P.lookup("linformer"), "11_linear_attention", "Low rank", holds=["zebras are equal"])
    assert P.search("zebra", {"linformer": record}) == [record]


def test_a_record_knows_its_address_and_card():
    record = P.Record(P.lookup("linformer"))
    assert not record.stands and record.address == "" and "planned for 11_linear_attention" in record.card()
    record.chapter, record.section = "11_linear_attention", "If the map has low rank"
    assert not record.stands and record.address == "11_linear_attention.ipynb#If-the-map-has-low-rank"
    record.holds.append("it is linear")
    record.measures.append("slope \u27e81.1\u27e9 (below 1.25)")
    card = record.card()
    assert record.stands and "holds      it is linear" in card and "measures   slope" in card


def test_coverage_counts_every_paper_once():
    count = P.coverage()
    assert sum(total for _, total in count.values()) == len(P.papers())
    assert all(0 <= stand <= total for stand, total in count.values())
    assert count["01_attention"] == (3, 3)


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (["introduction"], 0, "An Introduction to Transformers (2023)"),
        (["introduction", "linfomer"], 1, "did you mean 'linformer'"),
        (["--search", "low rank"], 0, "low_rank_heads"),
        (["--search", "zebra"], 1, "no paper contains all of: zebra"),
        (["--coverage"], 0, f" of {len(P.papers())}"),
        ([], 2, "python -m tfkit --search"),
    ],
)
def test_the_terminal(arguments, code, expected, capsys):
    from tfkit.__main__ import main

    assert main(arguments) == code
    printed = capsys.readouterr()
    assert expected in printed.out + printed.err


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "utf-8"])
def test_a_console_that_lacks_a_sign_prints_one_near_it(encoding, monkeypatch):
    from tfkit.__main__ import main

    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", console)
    record = P.Record(P.lookup("linformer"), measures=["caf\u00e9 \u27e81.1\u27e9 \u2192 \u4e2d"])
    monkeypatch.setattr("tfkit.__main__.collect", lambda: {"linformer": record})
    assert main(["linformer"]) == 0
    console.flush()
    said = console.buffer.getvalue().decode(encoding)
    if encoding == "utf-8":
        assert record.measures[0] in said
    else:
        assert ("cafe" if encoding == "ascii" else "caf\u00e9") + " <1.1> ? ?" in said


def test_the_terminal_copies_the_chapters_and_spares_work(tmp_path, capsys, monkeypatch):
    from tfkit.__main__ import main

    chapters = tmp_path / "chapters"
    chapters.mkdir()
    (chapters / "00_start_here.ipynb").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("tfkit.__main__.NOTEBOOKS", chapters)
    mine = tmp_path / "mine"
    assert main(["--notebooks", str(mine)]) == 0 and "begin with" in capsys.readouterr().out
    (mine / "00_start_here.ipynb").write_text("mine", encoding="utf-8")
    (chapters / "00_start_here.ipynb").write_text('{"new": 1}', encoding="utf-8")
    assert main(["--notebooks", str(mine)]) == 0
    assert "00_start_here.new.ipynb" in capsys.readouterr().out
    assert (mine / "00_start_here.ipynb").read_text(encoding="utf-8") == "mine"
    assert main(["--notebooks", str(chapters)]) == 1 and "name another folder" in capsys.readouterr().err
    assert main(["--notebooks", str(mine / "00_start_here.ipynb")]) == 1
    assert "cannot be copied" in capsys.readouterr().err


def test_parents_are_facts():
    named = [row for row in P.papers().values() if row.builds_on]
    assert len(named) > 350 and all("  " not in row.builds_on for row in named)
    assert "Transformer-XL" in P.lookup("rcmha").builds_on


def test_a_ratio_to_rounding_is_refused(capsys):
    paper = P.lookup(next(iter(P.papers())))
    paper.measures("gain", (6.0, 2.0), above=2.9, below=3.1)
    paper.measures("nothing over something", (1e-12, 0.5), below=1e-3)
    paper.measures("small units", (9e-9, 3e-9), above=2.9, noise=1e-12)
    assert "gain \u27e83\u27e9 (above 2.9 and below 3.1)" in capsys.readouterr().out
    for terms in ((9.6e-15, 1e-16), (1.0, -1e-6), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="'gain'.*is a ratio to rounding.*noise="):
            paper.measures("gain", terms, above=3)
    with pytest.raises(AssertionError, match="does not measure"):
        paper.measures("gain", (1.0, 2.0), above=0.6)

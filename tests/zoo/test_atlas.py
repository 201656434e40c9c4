"""The atlas: table, filters, taxonomy and the shared encoder."""

import re

import pytest
import torch

from tfkit import contracts
from tfkit.papers import Record, chapters, collect, papers
from tfkit.zoo import atlas
from tfkit.zoo.atlas import (
    APPLICATIONS,
    CLASSES,
    DOMAINS,
    TAXONOMY,
    CutTokens,
    OneEncoder,
    PairTokens,
    application_problems,
    atlas_row,
    atlas_table,
    bibtex,
    details,
    example_of,
    filtered,
    five_domains,
    frames,
    imports,
    known,
    leaf_state,
    most_named,
    parents,
    patches,
    pieces,
    runs,
    shown,
)
from tfkit.zoo.transformer import Stack, transformer_encoder


@pytest.fixture(scope="module")
def records():
    return collect()


# --- table and filters


def test_every_paper_has_one_row_and_links_only_when_taught(records):
    table = atlas_table(list(records.values()))
    ids = re.findall(r'<tr id="(\w+)"', table)
    assert ids == list(papers()) and table.count("<tr") == len(ids) + 1
    for record in records.values():
        assert ("<a href" in atlas_row(record)) == record.taught
        assert ("not yet" in atlas_row(record)) == (not record.stands)


def test_text_is_escaped():
    facts = papers()["linformer"]
    record = Record(type(facts)("x", "<b>", 2020, "a&b", "f", "01_attention", "", "https://x"), holds=["a < b"])
    record.chapter, record.section = "01_attention", 'quote "this"'
    for text in (atlas_row(record), details(record)):
        assert "<b>" not in text and "a < b" not in text and 'quote-"' not in text
    assert "1 holds: a &lt; b" in atlas_row(record)


def test_shown_is_short():
    record = Record(papers()["linformer"], "11_linear_attention", "s", holds=["x" * 300], not_here=["why"])
    assert shown(record).startswith("1 holds, 1 not here: xxx") and len(shown(record)) < 100


@pytest.mark.parametrize("order", ["title", "year", "kind", "family", "chapter"])
def test_filters_and_orders(records, order):
    found = filtered(records, kind="theory", years=(2022, 2024), order=order)
    values = [getattr(r.paper, order) for r in found]
    assert values == sorted(values) and found
    assert all(r.paper.kind == "theory" and 2022 <= r.paper.year <= 2024 for r in found)
    everything = [r for r in records.values() if r.paper.kind == "theory" and 2022 <= r.paper.year <= 2024]
    assert len(found) == len(everything)


def test_filters_combine_with_words(records):
    assert [r.paper.id for r in filtered(records, "linformer")][:1] == ["linformer"]
    assert all(r.paper.family == "positions" for r in filtered(records, "attention", family="positions"))
    with pytest.raises(ValueError, match="'color'"):
        filtered(records, order="color")


def test_bibtex_keeps_capitals():
    entry = bibtex(papers()["linformer"])
    assert entry.startswith("@misc{linformer,") and "{{Linformer" in entry and entry.count("{") == entry.count("}")


def test_parents_are_counted_once_per_paper():
    total = sum(len(parents(paper)) for paper in papers().values())
    assert sum(n for _, n in most_named(papers(), 10_000)) == total
    best = most_named(papers(), 5)
    assert best[0][0] == "ViT" and [n for _, n in best] == sorted((n for _, n in best), reverse=True)


def test_imports_are_those_of_the_source(tmp_path):
    (tmp_path / "a.py").write_text("from tfkit.zoo.b import x\nimport os\nfrom tfkit import data\n")
    (tmp_path / "b.py").write_text("def f():\n    from tfkit.zoo.c import y\n")
    assert imports(tmp_path) == {"a": {"b"}, "b": {"c"}}
    number = {name[3:]: name[:2] for name in chapters()}
    assert all(number[a] > number[b] for a, found in imports().items() for b in found)


def test_the_live_atlas_filters_while_typing(records):
    import ipywidgets

    box = atlas.atlas(records, most=10)
    flat = box.children
    named = {getattr(w, "description", ""): w for w in flat}
    assert flat[-3].value.count("<tr id") == 10
    named["words"].value = "linformer"
    table = next(w for w in flat if isinstance(w, ipywidgets.HTML) and "atlas" in w.value)
    assert 'id="linformer"' in table.value and 'id="swin"' not in table.value
    assert named["details"].value == "linformer" and "@misc{linformer" in box.children[-1].value
    named["words"].value = "zebra zebra"
    assert "<tr id" not in table.value and box.children[-1].value == ""


# --- transformer_survey


def test_transformer_survey_every_leaf_names_something(records):
    names = [name for branch in TAXONOMY.values() for leaf in branch.values() for name in leaf]
    assert names and all(known(name) for name in names)
    assert not known("nothing") and not known("nowhere.X") and not known("attention.Nothing")


def test_transformer_survey_leaves_run_where_something_stands(records):
    for branch in TAXONOMY.values():
        for names in branch.values():
            there = [n for n in names if "." in n or records[n].stands]
            state = leaf_state(names, records)
            assert state.startswith("runs" if there else "planned" if names else "no paper"), (names, state)


def test_transformer_survey_a_broken_example_does_not_run(records, monkeypatch):
    assert runs("primer", records)
    call, inputs = example_of(records["primer"])
    monkeypatch.setattr(atlas, "example_of", lambda record: (lambda *given: call(*given) * float("nan"), inputs))
    assert not runs("primer", records)
    with pytest.raises(KeyError):
        atlas.import_module("tfkit.zoo.attention").examples["nothing"]


# --- applications_survey


def test_applications_survey_table_is_valid_and_problems_are_found():
    assert application_problems(APPLICATIONS) == [] and {row[1] for row in APPLICATIONS} == set(DOMAINS)
    row = ("X", "vision", "", "", "encoder", "vit")
    for place, wrong in ((1, "cooking"), (4, "sideways"), (5, "no_such_paper")):
        bad = row[:place] + (wrong,) + row[place + 1 :]
        assert application_problems([row, bad]) == [f"X: {wrong!r}"]


@pytest.mark.parametrize("seed", range(3))
def test_applications_survey_cuts_lose_nothing(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 8, 6, generator=g)
    again = torch.nn.functional.fold(patches(x).mT, (8, 6), 2, stride=2)
    assert patches(x).shape == (2, 12, 12) and torch.equal(again, x)
    signal = torch.randn(2, 50, generator=g)
    assert torch.equal(pieces(signal).flatten(1), signal[:, :48])
    tone = torch.sin(torch.arange(1024) * 2 * torch.pi * 8 / 64)[None]  # 8 turns in a window of 64
    assert frames(tone).argmax(-1).unique().tolist() == [8]


@pytest.mark.parametrize("seed", range(2))
def test_applications_survey_encoder_is_shared(seed):
    torch.manual_seed(seed)
    model = five_domains(16, 1, 2)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    image, text = torch.rand(2, 1, 8, 8), torch.randint(256, (2, 5))
    inputs = (text, image, (image, text), torch.randn(2, 256), torch.randn(2, 48))
    for name, x in zip(CLASSES, inputs, strict=True):
        assert model(name, x).shape == (2, CLASSES[name])
    assert len(calls) == 5
    tokens = model.tokens["several modalities"]((image, text))
    assert torch.equal(tokens, torch.cat([model.tokens["vision"](image), model.tokens["language"](text)], 1))
    assert model.tokens["several modalities"].first is model.tokens["vision"]


def test_applications_survey_domains_must_agree():
    with pytest.raises(ValueError, match="vision"):
        OneEncoder({"vision": CutTokens(patches, 4, 8)}, transformer_encoder(8, 1, 2), {"sound": 2}, 8)
    assert isinstance(five_domains(8, 1, 2).encoder, Stack)
    assert contracts.gradients_reach(PairTokens(CutTokens(patches, 4, 8), CutTokens(pieces, 8, 8)),
                                     (torch.rand(1, 1, 4, 4), torch.randn(1, 16)))  # fmt: skip

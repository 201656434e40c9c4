"""Text: real, in its vocabulary, cut once; vocabularies round trip."""

import warnings

import numpy as np
import pytest
import torch

from tfkit import data as D


@pytest.mark.parametrize("kind, length", [("english", 450_000), ("python", 950_000), ("docstrings", 150_000)])
def test_text(kind, length):
    D.text.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = D.text(kind)
    assert 0.8 * length < len(text) < 1.25 * length
    assert set(text) <= set(D.CHARACTERS)
    assert ("\n    def __init__(self" in text) or kind != "python"
    assert text is D.text(kind)


@pytest.mark.parametrize("vocabulary, size", [(D.Characters(), 96), (D.Bytes(), 256)])
def test_vocabularies_round_trip(vocabulary, size):
    text = "def f(x):\n    return x ** 2  # ~{}"
    ids = vocabulary.encode(text)
    assert len(vocabulary) == size and ids.dtype == torch.int64 and ids.shape == (len(text),)
    assert 0 <= ids.min() and ids.max() < size
    assert vocabulary.decode(ids) == vocabulary.decode(ids.tolist()) == text
    assert vocabulary.encode("").shape == (0,) and vocabulary.encode("").dtype == torch.int64


def test_vocabulary_details():
    assert D.CHARACTERS[0] == "\n" and len(set(D.CHARACTERS)) == 96
    assert D.Bytes().decode(D.Bytes().encode("na\u00efve \u2192")) == "na\u00efve \u2192"
    assert len(D.Bytes().encode("\u2192")) == 3
    assert D.Characters("ab").encode("abba").tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="'\u2192' is not in the vocabulary of 96"):
        D.Characters().encode("a \u2192 b")
    with pytest.raises(ValueError, match="must not repeat"):
        D.Characters("aba")


def test_corpus_is_cut_once():
    corpus = D.corpus("docstrings", validation=0.25)
    whole = D.text("docstrings")
    assert corpus.vocabulary.decode(corpus.train) + corpus.vocabulary.decode(corpus.validation) == whole
    assert abs(len(corpus.validation) / len(whole) - 0.25) < 1e-4
    assert isinstance(D.corpus("docstrings", vocabulary=D.Bytes()).vocabulary, D.Bytes)


def test_windows_are_shifted_by_one():
    ids = torch.arange(100, 120)
    stream = D.windows(ids, length=5, size=64)
    seen = set()
    for _ in range(10):
        x, y = next(stream)
        assert x.shape == y.shape == (64, 5) and torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(5))
        seen |= set(x[:, 0].tolist())
    assert seen == set(range(100, 115))  # every window that has a next token, and no other
    first = lambda seed: next(D.windows(ids, 5, 8, seed))[0]
    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))
    assert next(D.windows(torch.arange(3), 2, 4))[1].max() == 2


def test_windows_of_a_memory_mapped_file(tmp_path):
    """uint16 on disk, ids above 32,767 included: the same windows as from a tensor, and only they are read."""
    ids = np.random.default_rng(0).integers(0, 60_000, 5_000).astype("uint16")
    ids.tofile(tmp_path / "corpus.bin")
    mapped = np.memmap(tmp_path / "corpus.bin", dtype="uint16", mode="r")
    x, y = next(D.windows(mapped, 16, 64, seed=3))
    expected, _ = next(D.windows(torch.from_numpy(ids.astype("int64")), 16, 64, seed=3))
    assert x.dtype == torch.int64 and torch.equal(x, expected) and torch.equal(x[:, 1:], y[:, :-1])
    assert x.max() > 32_767
    x.zero_()
    assert y[:, :-1].any()  # writing into the inputs leaves the targets alone


def test_names_of_babel():
    found = {(language, key): name for language, key, name in D.names("countries", ["en", "de", "ja", "sw"])}
    assert found["de", "FR"] == "Frankreich" and found["ja", "FR"] == "フランス" and found["sw", "FR"] == "Ufaransa"
    assert sum(language == "en" for language, _ in found) > 250 and all(key.isalpha() for _, key in found)
    months = D.names("months", ["it"])
    assert [name for _, _, name in months][:3] == ["gennaio", "febbraio", "marzo"] and len(months) == 12
    assert ("fr", "0", "lundi") in D.names("days", ["fr"])
    assert ("es", "de", "alemán") in D.names("languages", ["es"])


def test_languages_without_names_of_their_own_are_left_out():
    assert not D.names("days", ["ann"]) and not D.names("months", ["arn"])  # Babel would show "Mon" and "M01"
    many = ["ab", "af", "am", "an", "ar", "as", "ast", "az", "be", "bg", "bn", "cs", "cy", "da", "el", "eu", "fa", "hi"]
    found = D.names("days", many)
    assert len(found) == 7 * len(many) and len({name for _, _, name in found}) > 6 * len(many)
    again = [row for code in reversed(many) for row in D.names("days", [code])]
    assert sorted(found) == sorted(again)  # the order of asking does not matter


def test_dates_by_hand():
    pairs = D.dates(300, ["en", "de"])
    assert pairs == D.dates(300, ["en", "de"]) != D.dates(300, ["en", "de"], seed=1)
    months = {name: int(key) for _, key, name in D.names("months", ["en", "de"])}
    checked = 0
    for written, iso in pairs:
        year, month, day = map(int, iso.split("-"))
        assert 1950 <= year <= 2049 and str(year) in written
        words = written.replace(",", " ").replace(".", " ").split()
        named = [word for word in words if word in months]
        if named:  # April 3, 1987 or 3. April 1987
            assert months[named[0]] == month and str(day) in words
            checked += 1
    assert checked > 150

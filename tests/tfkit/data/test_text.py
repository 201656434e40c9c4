"""Text: real, in its vocabulary, cut once; vocabularies round trip."""

import warnings

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

"""Byte pairs: every byte comes back, GPT-2's files are read as transformers reads them, padding is marked."""

import copy
import json
import pickle
import random

import pytest
import torch
from transformers import GPT2Tokenizer

from tfkit import data
from tfkit.data.tokens import END

TEXT = data.text("docstrings")


@pytest.fixture(scope="module")
def trained():
    return data.BytePair.train(TEXT, 600)


def test_training_merges_what_is_frequent(trained):
    ids = trained.encode(TEXT)
    assert ids.dtype == torch.long and len(trained) == 600 and int(ids.max()) < 600
    assert trained.decode(ids) == TEXT and "".join(trained.pieces(TEXT[:500])) == TEXT[:500]
    assert len(ids) < 0.55 * len(TEXT.encode())
    assert trained.pieces("x the (") == ["x", " the", " ("]
    again = data.BytePair.train([TEXT[:1000], TEXT[1000:]], 600)
    assert sum(a == b for a, b in zip(trained._bytes, again._bytes, strict=True)) > 590  # the cut may split one word
    same = data.BytePair.train(TEXT, 600)
    assert same._bytes == trained._bytes
    assert len(data.BytePair.train("ab ab", 400)) < 262
    with pytest.raises(ValueError, match="at least 257.*got 256"):
        data.BytePair.train(TEXT, 256)
    assert len(data.BytePair.train(TEXT, 257)) == 257


def test_the_first_merge_is_the_most_frequent_pair():
    tokens = data.BytePair.train("xyxyxyxy zz", 258)
    assert tokens._bytes[-1] == b"xy" and tokens.encode("xyxy").tolist() == [257, 257]
    assert tokens.pieces("xyxyz") == ["xy", "xy", "z"]


@pytest.mark.parametrize("text", [
    "", " ", "\n\n\t  x ", "na\u00efve caf\u00e9", "\u4f60\u597d \U0001f600", "\x00\x7f\x80\xff", "e\u0301",
    f"one{END}two{END}", "it's we'll 12345 \u00bd",
])  # fmt: skip
def test_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text and trained.decode_bytes(ids) == text.encode()
    assert trained.encode(text.encode()).tolist() == ids.tolist()


def test_any_bytes_come_back(trained):
    random.seed(0)
    cases = [bytes(range(256)), *(bytes(random.choices(range(256), k=k)) for k in range(40)), b"ok \xff\xfe the \xe4"]
    for case in cases:
        assert trained.decode_bytes(trained.encode(case)) == case
    assert trained.decode(trained.encode(b"a\xffb")) == "a\ufffdb"
    single = [trained.encode(bytes([byte])).tolist() for byte in range(128, 256)]
    assert all(len(ids) == 1 for ids in single)


def test_the_end_token(trained):
    assert trained.end == 0 and trained.encode(f"one{END}").tolist()[-1] == trained.end
    assert trained.encode("<|endof|>").tolist().count(trained.end) == 0
    with pytest.raises(ValueError, match="600 is outside the vocabulary of 600"):
        trained.decode([600])
    with pytest.raises(ValueError, match="-1 is outside"):
        trained.decode_bytes([3, -1])


def test_saving_and_copying(trained, tmp_path):
    trained.save(tmp_path / "tokens.json")
    text = "The same tokens, \u00fcberall."
    others = [data.BytePair.load(tmp_path / "tokens.json"), copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))]
    for other in others:
        assert len(other) == 600 and other.encode(text).tolist() == trained.encode(text).tolist()
        assert other.end == trained.end and other._bytes == trained._bytes


def test_a_corpus_takes_it(trained):
    corpus = data.corpus("docstrings", vocabulary=trained)
    assert corpus.vocabulary is trained and len(corpus.train) > 8 * len(corpus.validation)
    assert trained.decode(torch.cat([corpus.train, corpus.validation])) == TEXT


@pytest.fixture
def files(trained, tmp_path):
    """A small vocabulary in the layout of GPT-2's files, the end token last as there."""
    known = json.loads(trained.tokenizer.to_str())["model"]
    order = [token for token, _ in sorted(known["vocab"].items(), key=lambda item: item[1]) if token != END] + [END]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(order)}), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in known["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


def test_gpt2_reads_what_transformers_reads(files):
    ours = data.BytePair.gpt2(*files)
    theirs = GPT2Tokenizer(vocab=str(files[0]), merges=str(files[1]))
    assert len(ours) == 600 and ours.end == 599
    texts = [TEXT[:3000], "Hello  world\n\n\tx=1", f"a{END}b", "it's we'll \u4f60\u597d \U0001f600 caf\u00e9 1234"]
    for text in [*texts, " lead", ""]:
        assert ours.encode(text).tolist() == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text


def test_files_that_are_no_tokenizer(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        data.BytePair.gpt2(tmp_path / "nowhere.json", files[1])
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        data.BytePair.gpt2(files[0], tmp_path / "nowhere.txt")
    known = json.loads(files[0].read_text(encoding="utf-8"))
    lost = {token: i for token, i in known.items() if token != "!"}
    files[0].write_text(json.dumps(lost | {"spare": known["!"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="1 of 256 have no token, first 33"):
        data.BytePair.gpt2(*files)
    files[0].write_text(json.dumps(known | {"a hole": 700}), encoding="utf-8")
    with pytest.raises(ValueError, match="601 tokens must be 0 to 600"):
        data.BytePair.gpt2(*files)
    files[0].write_text(json.dumps(dict(list(known.items())[:300])), encoding="utf-8")
    with pytest.raises(ValueError, match="are no tokenizer: .*out of vocabulary"):
        data.BytePair.gpt2(*files)


def test_pad():
    ids, real = data.pad([[1, 2, 3], torch.tensor([4])], value=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and real.tolist() == [[True] * 3, [True, False, False]]
    ids, real = data.pad([[1, 2, 3], [4, 5]], side="left")
    assert ids.tolist() == [[1, 2, 3], [0, 4, 5]] and real.tolist() == [[True] * 3, [False, True, True]]
    ids, real = data.pad([[], [7]])
    assert ids.tolist() == [[0], [7]] and real.tolist() == [[False], [True]] and ids.dtype == torch.long
    for wrong in (([], 0, "right"), ([[1]], 0, "up")):
        with pytest.raises(ValueError, match="a side 'right' or 'left'"):
            data.pad(*wrong)

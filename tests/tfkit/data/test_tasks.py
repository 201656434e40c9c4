"""Tasks: every generator against an oracle written here, its seed and its vocabulary."""

import pytest
import torch

from tfkit import data as D
from tfkit.data.tasks import _ADJECTIVES, _NOUNS, _VERBS

TASKS = {
    "copy": lambda seed: D.copy(20, 9, seed=seed),
    "reverse": lambda seed: D.reverse(20, 9, seed=seed),
    "sort": lambda seed: D.sort(20, 9, seed=seed),
    "parity": lambda seed: D.parity(20, 9, seed=seed),
    "associative_recall": lambda seed: D.associative_recall(20, 5, seed=seed),
    "induction": lambda seed: D.induction(20, 9, seed=seed),
    "listops": lambda seed: D.listops(20, seed=seed),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_seeded_and_stay_in_their_vocabulary(name):
    make = TASKS[name]
    task, again, other = make(0), make(0), make(1)
    assert torch.equal(task.inputs, again.inputs) and torch.equal(task.targets, again.targets)
    assert not torch.equal(task.inputs, other.inputs)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    make(0)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    size = len(task.vocabulary)
    assert len(set(task.vocabulary)) == size
    assert task.inputs.dtype == task.targets.dtype == torch.int64
    assert len(task.inputs) == len(task.targets) == 20
    assert 0 <= task.inputs.min() and task.inputs.max() < size
    asked = task.targets[task.targets != D.IGNORE]
    assert 0 <= asked.min() and asked.max() < size


@pytest.mark.parametrize("task, oracle", [(D.copy, list), (D.reverse, lambda row: row[::-1]), (D.sort, sorted)])
def test_copy_reverse_sort(task, oracle):
    found = task(50, 7, symbols=60)
    assert found.inputs.shape == found.targets.shape == (50, 7)
    assert found.inputs.max() == 59 and len(found.vocabulary) == 60
    assert found.targets.tolist() == [list(oracle(row)) for row in found.inputs.tolist()]
    assert found.inputs.data_ptr() != found.targets.data_ptr()


def test_parity_by_a_loop():
    task = D.parity(30, 11)
    for bits, answers in zip(task.inputs.tolist(), task.targets.tolist(), strict=True):
        odd = False
        for bit, answer in zip(bits, answers, strict=True):
            odd ^= bool(bit)
            assert answer == odd
    assert task.vocabulary == ("0", "1")


def test_modular_addition_has_every_pair_once():
    task = D.modular_addition(7)
    assert task.inputs.shape == task.targets.shape == (49, 3)
    assert {(a, b) for a, b, _ in task.inputs.tolist()} == {(a, b) for a in range(7) for b in range(7)}
    assert set(task.inputs[:, 2].tolist()) == {7} and task.vocabulary[7] == "="
    for (a, b, _), (i, j, answer) in zip(task.inputs.tolist(), task.targets.tolist(), strict=True):
        assert (i, j, answer) == (D.IGNORE, D.IGNORE, (a + b) % 7)


def test_associative_recall_by_lookup():
    task = D.associative_recall(40, pairs=6, keys=9, values=4)
    assert task.inputs.shape == task.targets.shape == (40, 13) and len(task.vocabulary) == 13
    places = set()
    for row, target in zip(task.inputs.tolist(), task.targets.tolist(), strict=True):
        words = [task.vocabulary[i] for i in row]
        keys, values, asked = words[0:12:2], words[1:12:2], words[12]
        assert all(k[0] == "k" for k in keys) and all(v[0] == "v" for v in values) and len(set(keys)) == 6
        assert target[:-1] == [D.IGNORE] * 12
        assert task.vocabulary[target[-1]] == dict(zip(keys, values, strict=True))[asked]
        places.add(keys.index(asked))
    assert places == set(range(6))


def test_induction_repeats_its_first_block():
    task = D.induction(30, 6)
    assert task.inputs.shape == task.targets.shape == (30, 11)
    for row, target in zip(task.inputs.tolist(), task.targets.tolist(), strict=True):
        block = row[:6]
        assert row == (block + block)[:-1]
        assert target == [D.IGNORE] * 6 + block[1:]


def evaluate(tokens):
    """ListOps by recursion: consumes one expression, returns its value and the rest."""
    head, *rest = tokens
    if not head.startswith("["):
        return int(head), rest
    values = []
    while rest[0] != "]":
        value, rest = evaluate(rest)
        values.append(value)
    values.sort()
    middle = values[(len(values) - 1) // 2]
    return {"[MIN": values[0], "[MAX": values[-1], "[MED": middle, "[SM": sum(values) % 10}[head], rest[1:]


def test_listops_by_recursion():
    task = D.listops(150, length=40, depth=3, arguments=4)
    assert task.inputs.shape == (150, 40) and task.targets.shape == (150, 1)
    operations, deepest = set(), 0
    for row, (target,) in zip(task.inputs.tolist(), task.targets.tolist(), strict=True):
        words = [task.vocabulary[i] for i in row]
        words = words[: words.index("_")] if "_" in words else words
        value, rest = evaluate(words)
        assert not rest and "_" not in words
        assert value == target == D.listops_value(words)
        operations |= {w for w in words if w[0] == "["}
        level = 0
        for word in words:
            level += (word[0] == "[") - (word == "]")
            deepest = max(deepest, level)
    assert operations == {"[MIN", "[MAX", "[MED", "[SM"} and deepest == 3
    assert set(task.targets.flatten().tolist()) == set(range(10))


@pytest.mark.parametrize(
    "text, value", [("7", 7), ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9), ("[MED 1 2 3 4 ]", 2), ("[SM 9 9 _ ] _ _", 8)]
)
def test_listops_value_of_known_expressions(text, value):
    assert D.listops_value(text.split()) == value


@pytest.mark.parametrize("text", ["", "]", "[MAX 1", "1 2", "[MAX ]", "[MAX 1 ] ]", "[AVG 1 2 ]"])
def test_listops_value_rejects_what_is_no_expression(text):
    with pytest.raises(ValueError):
        D.listops_value(text.split())


def back(words):
    """The target language parsed back into the source language."""
    meaning = {**{v: k for table in (_NOUNS, _ADJECTIVES, _VERBS) for k, v in table.items()}}
    *words, verb = words
    phrases = " ".join(words).split("la ")[1:]
    out = []
    for phrase in phrases:
        noun, *rest = phrase.split()
        plural = rest[:1] == [noun]
        adjectives = rest[plural:]
        out.append(" ".join(["two" if plural else "the", *(meaning[a] for a in adjectives), meaning[noun]]))
    return f"{out[0]} {meaning[verb]} {out[1]}"


def test_translation_by_parsing_it_back():
    pair = D.translation(200)
    assert pair.source.shape == (200, 7) and pair.target.shape == (200, 11)
    assert pair.source.dtype == pair.target.dtype == torch.int64
    for source, target in zip(pair.source.tolist(), pair.target.tolist(), strict=True):
        sentence = [D.TRANSLATION_SOURCE[i] for i in source]
        answer = [D.TRANSLATION_TARGET[i] for i in target]
        words = [w for w in sentence if w != "<pad>"]
        assert sentence == words + ["<pad>"] * (7 - len(words))
        assert answer[0] == "<start>" and answer.count("<end>") == 1
        end = answer.index("<end>")
        assert set(answer[end + 1 :]) <= {"<pad>"}
        assert back(answer[1:end]) == " ".join(words)
        assert D.translate(" ".join(words)).split() == answer[1:end]
    assert {len(set(D.TRANSLATION_SOURCE)), len(set(D.TRANSLATION_TARGET))} == {17, 18}
    assert set(pair.source.flatten().tolist()) == set(range(17)) and pair.target.max() == 17
    assert torch.equal(pair.target, D.translation(200).target)
    assert not torch.equal(pair.source, D.translation(200, seed=1).source)
    assert D.translate("the small cat sees two dog") == "la miru ti la bako bako vido"


def test_as_language_model():
    task = D.reverse(12, 4, symbols=5)
    model = task.as_language_model()
    assert model.inputs.shape == model.targets.shape == (12, 8) and model.vocabulary == (*task.vocabulary, "|")
    for x, y, inputs, targets in zip(*(t.tolist() for t in (*task[:2], *model[:2])), strict=True):
        assert inputs == [*x, 5, *y[:-1]]
        assert targets == [D.IGNORE] * 4 + y
    single = D.listops(3).as_language_model()
    assert single.inputs.shape == (3, 49) and torch.equal(single.targets[:, -1:], D.listops(3).targets)
    with pytest.raises(ValueError, match="-100"):  # -100 is no token that a model could read
        D.associative_recall(3, 2).as_language_model()

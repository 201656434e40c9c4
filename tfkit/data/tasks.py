"""Tasks with a known answer, for experiments that need one. `tfkit.data` offers them all.

Every generator takes a `seed` and returns the same tensors for the same seed. Token tensors are int64.
"""

from __future__ import annotations

import string
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = [
    "IGNORE", "TRANSLATION_SOURCE", "TRANSLATION_TARGET", "Task", "Translation", "associative_recall", "copy",
    "induction", "listops", "listops_value", "modular_addition", "parity", "reverse", "sort", "translate",
    "translation",
]  # fmt: skip

IGNORE = -100  # a target that does not count in the loss


class Task(NamedTuple):
    """Inputs (b, n), targets (b, m) with IGNORE where nothing is asked, and the name of every token id."""

    inputs: Int[Tensor, "b n"]
    targets: Int[Tensor, "b m"]
    vocabulary: tuple[str, ...]

    def as_language_model(self) -> Task:
        """The same task for a decoder alone: inputs, separator, answer; only the answer's tokens count.

        A batch row a b c with answer x y becomes inputs  a b c | x  and targets  . . . x y . The separator is the last
        token id.
        """
        if (self.targets == IGNORE).any():
            raise ValueError(f"some targets are {IGNORE}: this task is one for a decoder already")
        separator = len(self.vocabulary)
        bar = torch.full((len(self.inputs), 1), separator)
        inputs = torch.cat([self.inputs, bar, self.targets[:, :-1]], 1)
        silent = torch.full_like(self.inputs, IGNORE)
        return Task(inputs, torch.cat([silent, self.targets], 1), (*self.vocabulary, "|"))


def _draw(count: int, length: int, symbols: int, seed: int) -> Tensor:
    for name, value, least in (("count", count, 1), ("length", length, 1), ("symbols", symbols, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    return torch.randint(symbols, (count, length), generator=torch.Generator().manual_seed(seed))


def _names(symbols: int) -> tuple[str, ...]:
    return tuple(string.ascii_letters[i] if i < 52 else f"s{i}" for i in range(symbols))


def copy(count: int, length: int, symbols: int = 8, seed: int = 0) -> Task:
    """Answer the sequence itself: a c b -> a c b. Shapes (count, length)."""
    x = _draw(count, length, symbols, seed)
    return Task(x, x.clone(), _names(symbols))


def reverse(count: int, length: int, symbols: int = 8, seed: int = 0) -> Task:
    """Answer the sequence backwards: a c b -> b c a. Shapes (count, length)."""
    x = _draw(count, length, symbols, seed)
    return Task(x, x.flip(1), _names(symbols))


def sort(count: int, length: int, symbols: int = 8, seed: int = 0) -> Task:
    """Answer the sequence in order: c a b a -> a a b c. Shapes (count, length)."""
    x = _draw(count, length, symbols, seed)
    return Task(x, x.sort(1).values, _names(symbols))


def parity(count: int, length: int, seed: int = 0) -> Task:
    """Answer at each position whether the number of ones so far is odd. Shapes (count, length)."""
    x = _draw(count, length, 2, seed)
    return Task(x, x.cumsum(1) % 2, ("0", "1"))


def modular_addition(modulus: int = 23) -> Task:
    """All pairs a, b with the answer (a + b) mod `modulus` at the last of three positions. Shapes (modulus ** 2, 3);
    the third input is "=".
    """
    if modulus < 2:
        raise ValueError(f"modulus must be at least 2, got {modulus}")
    a, b = torch.meshgrid(torch.arange(modulus), torch.arange(modulus), indexing="ij")
    a, b = a.reshape(-1), b.reshape(-1)
    x = torch.stack([a, b, torch.full_like(a, modulus)], 1)
    targets = torch.full_like(x, IGNORE)
    targets[:, -1] = (a + b) % modulus
    return Task(x, targets, (*map(str, range(modulus)), "="))


def associative_recall(count: int, pairs: int, keys: int = 16, values: int = 16, seed: int = 0) -> Task:
    """`pairs` different keys, each followed by its value, then one of the keys again: answer its value at the last
    position.

    k3 v1 k7 v4 k3 -> v1. Shapes (count, 2 pairs + 1). Keys are ids 0 .. keys - 1, values follow.
    """
    if not 1 <= pairs <= keys:
        raise ValueError(f"pairs must be between 1 and the number of keys, {keys}; got {pairs}")
    if count < 1 or values < 1:
        raise ValueError(f"count and values must be at least 1, got {count} and {values}")
    generator = torch.Generator().manual_seed(seed)
    key = torch.rand(count, keys, generator=generator).argsort(1)[:, :pairs]  # (count, pairs), distinct in a row
    value = torch.randint(values, (count, pairs), generator=generator)
    asked = torch.randint(pairs, (count, 1), generator=generator)
    stream = torch.stack([key, keys + value], 2).reshape(count, 2 * pairs)
    inputs = torch.cat([stream, key.gather(1, asked)], 1)
    targets = torch.full_like(inputs, IGNORE)
    targets[:, -1:] = keys + value.gather(1, asked)
    return Task(inputs, targets, tuple([f"k{i}" for i in range(keys)] + [f"v{i}" for i in range(values)]))


def induction(count: int, length: int, symbols: int = 16, seed: int = 0) -> Task:
    """A random block of `length` tokens, then the same block again: from its second token on, the repeat can be
    predicted.

    Shapes (count, 2 length - 1): inputs are all but the last token, targets all but the first, IGNORE in the first
    block.
    """
    block = _draw(count, length, symbols, seed)
    stream = torch.cat([block, block], 1)
    targets = stream[:, 1:].clone()
    targets[:, :length] = IGNORE
    return Task(stream[:, :-1], targets, _names(symbols))


_LISTOPS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]", "_")


def listops_value(tokens: list[str]) -> int:
    """The oracle: evaluates a ListOps expression such as [MAX 2 9 [MIN 4 7 ] 0 ]. MED is the lower median, SM the sum
    modulo 10.
    """
    operations = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda v: sorted(v)[(len(v) - 1) // 2],
        "[SM": lambda v: sum(v) % 10,
    }
    stack: list[list] = [[]]
    for token in tokens:
        if token in operations:
            stack.append([token])
        elif token == "]":
            name, *values = stack.pop() if len(stack) > 1 else [None]
            if not values:
                raise ValueError(f"']' closes nothing, or an operation without numbers, in {' '.join(tokens)}")
            stack[-1].append(operations[name](values))
        elif token.isdigit():
            stack[-1].append(int(token))
        elif token != "_":
            raise ValueError(f"{token!r} is not a ListOps token")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"not one complete expression: {' '.join(tokens)}")
    return stack[0][0]


def listops(count: int, length: int = 48, depth: int = 3, arguments: int = 4, seed: int = 0) -> Task:
    """Nested list operations, padded with "_" to `length`; the answer, a digit, is one target per row: shapes (count,
    length) and (count, 1).

    Expressions have at most `depth` levels and 2 to `arguments` arguments; longer ones are drawn again. Source:
    "ListOps", 2018.
    """
    if count < 1 or length < 4 or depth < 1 or arguments < 2:
        raise ValueError(
            f"need count 1, length 4, depth 1, arguments 2 or more; got {count}, {length}, {depth}, {arguments}"
        )
    generator = torch.Generator().manual_seed(seed)
    pick = lambda high: int(torch.randint(high, (1,), generator=generator))

    def expression(level: int) -> list[str]:
        if level == 0 or (level < depth and pick(2)):
            return [str(pick(10))]
        parts = [part for _ in range(2 + pick(arguments - 1)) for part in expression(level - 1)]
        return [_LISTOPS[10 + pick(4)], *parts, "]"]

    index, rows, answers = {name: i for i, name in enumerate(_LISTOPS)}, [], []
    while len(rows) < count:
        tokens = expression(depth)
        if len(tokens) <= length:
            answers.append([listops_value(tokens)])
            rows.append([index[t] for t in tokens + ["_"] * (length - len(tokens))])
    return Task(torch.tensor(rows), torch.tensor(answers), _LISTOPS)


# Two tiny languages. The second puts the verb last and the adjective after its noun, and doubles a noun for two.

_NOUNS = {"cat": "miru", "dog": "bako", "bird": "tilo", "child": "sena", "fish": "polu", "king": "raja"}
_ADJECTIVES = {"small": "ti", "red": "kar", "old": "wem", "happy": "lun"}
_VERBS = {"sees": "vido", "likes": "amas", "follows": "segu", "hears": "odo"}
TRANSLATION_SOURCE = ("<pad>", "the", "two", *_NOUNS, *_ADJECTIVES, *_VERBS)
TRANSLATION_TARGET = ("<pad>", "<start>", "<end>", "la", *_NOUNS.values(), *_ADJECTIVES.values(), *_VERBS.values())


class Translation(NamedTuple):
    """Source (b, n) and target (b, m) sentences, 0 where padded; the target begins with <start> (1) and finishes with
    <end> (2).
    """

    source: Int[Tensor, "b n"]
    target: Int[Tensor, "b m"]


def translate(sentence: str) -> str:
    """The oracle of the made-up language: "the small cat sees two dog" becomes "la miru ti la bako bako vido"."""
    words, phrases, verb, phrase = sentence.split(), [], None, []
    for word in words:
        if word in _VERBS:
            verb = _VERBS[word]
            phrases, phrase = [*phrases, phrase], []
        else:
            phrase.append(word)
    phrases.append(phrase)
    out = []
    for number, *rest in phrases:
        *adjectives, noun = rest
        out += ["la"] + [_NOUNS[noun]] * (2 if number == "two" else 1) + [_ADJECTIVES[a] for a in adjectives]
    return " ".join([*out, verb])


def translation(count: int, seed: int = 0) -> Translation:
    """Random sentences (the|two) [adjective] noun verb (the|two) [adjective] noun and their translations by
    `translate`.

    Word order changes and a plural doubles its noun, so a decoder has to look back at the right source words.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    generator = torch.Generator().manual_seed(seed)
    pick = lambda choices: choices[int(torch.randint(len(choices), (1,), generator=generator))]
    phrase = lambda: [pick(["the", "two"]), *([pick([*_ADJECTIVES])] if pick([0, 1]) else []), pick([*_NOUNS])]
    source, target = torch.zeros(count, 7, dtype=torch.long), torch.zeros(count, 9 + 2, dtype=torch.long)
    for row in range(count):
        words = [*phrase(), pick([*_VERBS]), *phrase()]
        answer = ["<start>", *translate(" ".join(words)).split(), "<end>"]
        source[row, : len(words)] = torch.tensor([TRANSLATION_SOURCE.index(w) for w in words])
        target[row, : len(answer)] = torch.tensor([TRANSLATION_TARGET.index(w) for w in answer])
    return Translation(source, target)

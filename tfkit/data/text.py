"""Text: real English and Python, vocabularies of characters and bytes, corpora cut once, and their windows.

Token tensors are int64.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import inspect
import string
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tfkit.data._base import at_least, generator, one_of, share
from tfkit.data.tokens import BytePair

__all__ = ["CHARACTERS", "NAMES", "Bytes", "Characters", "Corpus", "corpus", "dates", "names", "text", "windows"]

# The characters a text may contain. Fixed, so that no number depends on the Python version that supplies the text.
CHARACTERS = "\n" + "".join(sorted(string.printable[:95]))
_CODE = (
    "argparse ast calendar configparser csv dataclasses difflib fractions heapq inspect json.decoder json.encoder "
    "random shutil statistics string textwrap typing zipfile"
).split()


class Characters:
    """A character vocabulary: newline and the 95 printable ASCII characters, so 96 tokens."""

    def __init__(self, characters: str = CHARACTERS):
        if len(set(characters)) != len(characters):
            raise ValueError(f"a vocabulary must not repeat characters: {characters!r}")
        self.characters = characters
        self._index = {c: i for i, c in enumerate(characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Int[Tensor, "n"]:
        """Token ids of a string. Raises ValueError naming the first character that is not in the vocabulary."""
        if missing := next((c for c in text if c not in self._index), None):
            raise ValueError(f"character {missing!r} is not in the vocabulary of {len(self)} characters")
        return torch.tensor([self._index[c] for c in text], dtype=torch.long)

    def decode(self, ids) -> str:
        """The string of a sequence of token ids."""
        return "".join(self.characters[int(i)] for i in ids)


class Bytes:
    """A byte vocabulary: 256 tokens, any text (UTF-8)."""

    def __len__(self) -> int:
        return 256

    def encode(self, text: str) -> Int[Tensor, "n"]:
        return torch.tensor(list(text.encode()), dtype=torch.long)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids).decode(errors="replace")


@functools.cache
def text(kind: str = "english") -> str:
    """Real text from Python's standard library, in printable ASCII.

    kind   "english": the language reference as `help()` shows it, about 450,000 characters
           "python": source code of nineteen modules, about 950,000 characters
           "docstrings": the documentation strings of the same modules, about 150,000 characters
    The exact text differs a little between Python versions.
    """
    if kind == "english":
        from pydoc_data.topics import topics

        raw = "\n\n".join(topics[name] for name in sorted(topics))
    elif kind == "python":
        raw = "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _CODE)
    elif kind == "docstrings":
        modules = [importlib.import_module(name) for name in _CODE]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some members of typing are deprecated
            things = [thing for module in modules for _, thing in inspect.getmembers(module) if inspect.getdoc(thing)]
            raw = "\n\n".join(dict.fromkeys(inspect.getdoc(thing) for thing in things if callable(thing)))
    else:
        raise ValueError(f"text must be 'english', 'python' or 'docstrings', got {kind!r}")
    return "".join(c for c in raw if c in CHARACTERS)


class Corpus(NamedTuple):
    """Token ids for training and validation, and the vocabulary that made them."""

    train: Int[Tensor, "n"]
    validation: Int[Tensor, "m"]
    vocabulary: Characters | Bytes | BytePair


def corpus(
    kind: str = "english", validation: float = 0.1, vocabulary: Characters | Bytes | BytePair | None = None
) -> Corpus:
    """A text as token ids, cut once: the last share is for validation and never overlaps the training part."""
    share(validation=validation)
    vocabulary = Characters() if vocabulary is None else vocabulary
    ids = vocabulary.encode(text(kind))
    cut = round(len(ids) * (1 - validation))
    return Corpus(ids[:cut], ids[cut:], vocabulary)


def windows(ids: Int[Tensor, "n"], length: int, size: int, seed: int = 0):
    """Endless batches for a language model: inputs (size, length) and the same windows one token later, int64.

    ids   a tensor, or a NumPy array such as a memory-mapped file of uint16, of which only the windows are read
    """
    at_least(1, size=size)
    if not 1 <= length < len(ids):
        raise ValueError(f"length must be between 1 and {len(ids) - 1}, one less than the text; got {length}")
    rng = generator(seed)
    steps = torch.arange(length + 1)
    while True:
        start = torch.randint(len(ids) - length, (size, 1), generator=rng)  # (size, 1)
        place = start + steps
        read = ids[place] if isinstance(ids, Tensor) else torch.from_numpy(ids[place.numpy()].astype("int64"))
        yield read[:, :-1].clone(), read[:, 1:].clone()  # a reader may write into one


# what: the attribute of a Babel locale that holds it
NAMES = {"countries": "territories", "languages": "languages", "months": "months", "days": "days"}


def names(kind: str = "countries", languages: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
    """Real names in many languages: ("de", "FR", "Frankreich") is language, key, name. Source: Unicode CLDR, in Babel.

    kind       "countries" (key: two letters), "languages" (its code), "months" (1 to 12), "days" (0, Monday, to 6)
    languages  codes such as "de"; all that Babel knows, more than 200 with their own names, when None (takes seconds)
    Raises ValueError for an unknown kind or language.
    """
    one_of("names", kind, NAMES)
    from babel import Locale, localedata

    known = [code for code in sorted(localedata.locale_identifiers()) if "_" not in code and code != "root"]
    for code in languages or ():
        if code not in known:
            raise ValueError(f"Babel knows no language {code!r}; it knows {len(known)} such as de, ja, sw")
    table = lambda code: getattr(Locale(code), NAMES[kind])
    read = (lambda code: table(code)["format"]["wide"]) if kind in ("months", "days") else table
    inherited, found = dict(read("root")), []  # what a language without names of its own would show
    for code in languages or known:
        own = {str(key): name for key, name in read(code).items() if inherited.get(key) != name}
        found += [(code, key, name) for key, name in own.items() if kind != "countries" or key.isalpha()]
    return found


def dates(
    count: int, languages: Sequence[str] = ("en", "de", "fr", "ja", "ar"), seed: int = 0
) -> list[tuple[str, str]]:
    """Dates as people write them, and as ISO 8601 does: ("3. April 1987", "1987-04-03"); a task of translation.

    Days from 1950 to 2049, each in a random language and one of Babel's formats medium, long and full.
    """
    at_least(1, count=count)
    names("days", languages)  # refuses what Babel does not know
    from babel.dates import format_date

    rng, first = generator(seed), datetime.date(1950, 1, 1)
    draw = lambda high: int(torch.randint(high, (1,), generator=rng))
    out = []
    for _ in range(count):
        day = first + datetime.timedelta(draw(36525))
        form = ("medium", "long", "full")[draw(3)]
        out.append((format_date(day, form, locale=languages[draw(len(languages))]), day.isoformat()))
    return out

"""Published weights into models of the zoo, strictly: `pretrained.load(gpt2(), "folder", layout="gpt2")`.

A checkpoint is a set of named tensors. A `Layout` is a table that says, for every tensor of our model, which tensors
of the file it is made of. The table is all that a further model needs; nothing here knows a model.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tfkit.layouts import TABLES

__all__ = ["Layout", "layouts", "load", "read", "transforms"]

# What a table may name in its third column: functions of one tensor of the file.
transforms: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": Tensor.t,  # a matrix stored as (inputs, outputs); vectors stay
    "squeezed": lambda t: t.squeeze(0),
    "class_place": lambda t: t[0, :1],  # positions (1, 1 + h w, d): the class token's, and those of a square of patches
    "grid_places": lambda t: t[0, 1:].unflatten(0, (math.isqrt(t.shape[1] - 1), -1)),
    "query_first": lambda t: t.unflatten(0, (3, -1))[[1, 0, 2]].flatten(0, 1),  # stored as keys, queries, values
    "token_places": lambda t: t[0, :2],  # positions (1, 2 + h w, d), with a distillation token
    "grid_places_after_two": lambda t: t[0, 2:].unflatten(0, (math.isqrt(t.shape[1] - 2), -1)),
}


@dataclass(frozen=True)
class Layout:
    """How a file names its tensors, seen from a model of the zoo.

    table   a line for each rule: our name, a name in the file, and (or not) one of `transforms`. `*` stands for one
            part of a name between dots, the same on both sides, in order (a block's number, `weight` or `bias`).
            `{q,k,v}` joins several tensors along their first axis; `#` counts 0, 1, ... as far as the file goes and
            puts an axis for the count in front. The first rule that fits a tensor of ours counts.
    prefix  what may stand before the file's names and is taken off (`transformer.` in GPT-2 with its head)
    tied    name in the file -> the name whose numbers it may share: absent, it is read from there; present while
            nothing of ours reads it, it must be equal
    ignore  names (`*` for anything, dots too) of tensors that are no weights: masks, numbers of positions
    rename  pieces of names that older files spell differently -> how the table spells them
    """

    table: str
    prefix: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> Source | None:
        """The rule for a tensor of ours, with its `*` filled in; None where no rule fits."""
        for ours, theirs, *how in filter(None, map(str.split, self.table.splitlines())):
            found = re.fullmatch(re.escape(ours).replace(r"\*", r"([^.]+)"), name)
            if found:
                parts = iter(found.groups())
                theirs = re.sub(r"\*", lambda _, parts=parts: next(parts), theirs)
                before, inside, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", theirs).groups()
                names = [before + one + after for one in (inside or "").split(",")]
                return Source(names, *(transforms[each] for each in how))
        return None

    def name(self, full: str) -> str:
        """A name in the file as the table spells it."""
        short = full.removeprefix(self.prefix)
        for old, new in self.rename.items():
            short = short.replace(old, new)
        return short


class Source(NamedTuple):
    """Names in the file (each may count with `#`) and the function that each tensor goes through."""

    patterns: list[str]
    change: Callable[[Tensor], Tensor] = lambda t: t

    def names(self, stored: Mapping[str, Stored]) -> list[list[str]]:
        """For every pattern the names that it stands for: as many as the file has, and at least one."""
        counted = ([p.replace("#", str(i)) for i in range(len(stored) + 1)] if "#" in p else [p] for p in self.patterns)
        return [few[:1] + list(itertools.takewhile(stored.__contains__, few[1:])) for few in counted]

    def make(self, tensors: list[list[Tensor]]) -> Tensor:
        counted = "#" in self.patterns[0]
        changed = [[self.change(t) for t in few] for few in tensors]
        joined = [torch.stack(few) if counted else few[0] for few in changed]
        return torch.cat(joined, int(counted)) if len(joined) > 1 else joined[0]  # a count has no axis to join along


class Stored(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def read(path: str | Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name; a tensor's numbers are read only when asked for.

    path is a `.safetensors` file, a checkpoint of `torch.save` (opened with weights_only, so it runs no code; a state
    dict alone or under "model" or "state_dict"), the `.index.json` of a checkpoint in pieces, or a folder with one of
    these under its usual name. Raises FileNotFoundError, and ValueError for what is none of these.
    """
    path = Path(path)
    if path.is_dir():
        usual = [stem + end for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
        found = [path / name for name in usual if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} holds none of {', '.join(usual)}")
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.name.endswith(".index.json"):
        return _read_pieces(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_pieces(index: Path) -> dict[str, Stored]:
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    outside = sorted(file for file in set(where.values()) if Path(file).name != file)
    if outside:
        raise ValueError(f"{index.name} points outside its folder: {', '.join(outside)}")
    files = {file: read(index.parent / file) for file in sorted(set(where.values()))}
    held = [(name, file, stored) for file, piece in files.items() for name, stored in piece.items()]
    wrong = sorted({(name, file) for name, file, _ in held} ^ set(where.items()))
    if wrong:
        raise ValueError(f"{index.name} and its files disagree on {', '.join(f'{n} in {f}' for n, f in wrong)}")
    return {name: stored for name, _, stored in held}


def _read_safetensors(path: Path) -> dict[str, Stored]:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading .safetensors takes one more package: pip install safetensors") from None
    file = safe_open(path, framework="pt")
    shape = lambda name: tuple(file.get_slice(name).get_shape())
    return {name: Stored(shape(name), lambda name=name: file.get_tensor(name)) for name in file.keys()}


def _read_torch(path: Path) -> dict[str, Stored]:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state, Mapping) and isinstance(state.get(key), Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no state dict (tensors by name, alone or under 'model' or 'state_dict')")
    return {name: Stored(tuple(value.shape), lambda value=value: value) for name, value in state.items()}


def load(model: nn.Module, path: str | Path, layout: str | Layout, ignore: Iterable[str] = ()) -> nn.Module:
    """Fill a model of the zoo with the weights at `path`; returns the model, which keeps its dtype and device.

    path    as for `read`
    layout  a name in `layouts`, or a `Layout`
    ignore  names of tensors in the file to leave alone, `*` for anything: ("cls.*",)

    Nothing is written unless everything fits: ValueError names every tensor of the file that is unknown, that is
    missing, and that has another shape. What no tensor says (number of heads, eps, base of the rotation) is the
    model's, and a wrong one goes unnoticed here: compare with the config.json beside the weights.
    """
    if isinstance(layout, str) and layout not in layouts:
        raise ValueError(f"no layout is called {layout!r}; there are {', '.join(layouts)}")
    layout = layouts[layout] if isinstance(layout, str) else layout
    stored, ours = _named(read(path), layout, (*layout.ignore, *ignore)), model.state_dict()
    wrong, plans, used = [], [], set()
    for name, target in ours.items():
        source = layout.source(name)
        if target.is_meta or source is None:
            why = "is on the meta device" if source else "has no rule in this layout"
            wrong.append(f"{name} of the model {why}")
            continue
        names = [[n if n in stored else layout.tied.get(n, n) for n in few] for few in source.names(stored)]
        flat = [n for few in names for n in few]
        used.update(flat)
        missing = [f"{n} is missing, of which {name} is made" for n in flat if n not in stored]
        wrong += missing or _misfit(name, tuple(target.shape), names, source, stored)
        plans.append((target, names, source))
    for name in sorted(set(stored) - used):
        other = layout.tied.get(name)
        if other not in stored:
            wrong.append(f"{name} is unknown: nothing in the model is made of it")
        elif not torch.equal(stored[name].read(), stored[other].read()):
            wrong.append(f"{name} differs from {other}, and the model has one tensor for both")
    if wrong:
        raise ValueError(f"{path} does not fit this {type(model).__name__}:\n  " + "\n  ".join(wrong))
    with torch.no_grad():
        for target, names, source in plans:
            target.copy_(source.make([[stored[n].read() for n in few] for few in names]))
    return model


def _named(stored: dict[str, Stored], layout: Layout, ignore: tuple[str, ...]) -> dict[str, Stored]:
    """The tensors as the table spells their names, without those to ignore."""
    short: dict[str, Stored] = {}
    for full, tensor in stored.items():
        name = layout.name(full)
        if any(fnmatchcase(n, pattern) for n in (name, full) for pattern in ignore):
            continue
        if name in short:
            raise ValueError(f"the file has {name} twice, with and without {layout.prefix!r} or under an older name")
        short[name] = tensor
    return short


def _misfit(name: str, shape: tuple, names: list[list[str]], source: Source, stored: Mapping[str, Stored]) -> list[str]:
    """What is wrong with the shapes, found without reading a number; an empty list when they fit."""
    try:
        made = source.make([[torch.empty(stored[n].shape, device="meta") for n in few] for few in names])
    except (RuntimeError, IndexError):
        made = None
    if made is not None and tuple(made.shape) == shape:
        return []
    given = ", ".join(f"{n} {stored[n].shape}" for few in names for n in few)
    return [f"{given}: misshapen, {name} is {shape}"]


layouts: dict[str, Layout] = {name: Layout(**table) for name, table in TABLES.items()}

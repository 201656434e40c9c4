"""What layers keep of the tokens they have read, so that a text can be fed in pieces.

    with remember(model) as past:
        first = model(text[:, :5])
        then = model(text[:, 5:6], start=5)      # together: the outputs of the whole text at once

A layer that reads earlier tokens asks for its state in `forward`, once and whatever its input, and keeps there what
it needs next time:

    state = recall(self)                         # None outside `remember`
    if state is not None:
        x = state.append("tokens", x, dim=1)     # what was kept, and these tokens

Which state it gets depends on its place: the k-th question that a layer asks in one pass through the remembered
model always gets the same, so that a layer used twice, with shared weights, has two pasts. A layer that cannot go on
from a state says why in its attribute `no_past`, and `remember` then raises ValueError. An attend function says how
far back its queries read in `looks_back`. No module is changed: states belong to the `with` block and end with it.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn

_open: ContextVar[tuple[Past, ...]] = ContextVar("open", default=())  # the pasts of this thread or task, innermost last
_count, _lock = 0, threading.Lock()  # how many there are anywhere: torch.compile can watch a number, not a ContextVar


class State(dict):
    """What one layer keeps at one place: names to tensors, whose first axis is the batch, or to plain numbers."""

    def __init__(self):
        super().__init__()
        # A larger tensor or None, what of it is in use, and where that ends.
        self._room: dict[str, tuple[Tensor | None, Tensor, int]] = {}

    def append(self, name: str, piece: Tensor, dim: int = -2, most: float = math.inf) -> Tensor:
        """What was kept under `name` and then `piece`, along axis `dim`; of both the last `most` are kept.

        Without gradients the piece is written into room that doubles when it is full, so a token costs no copy of
        what was there. Raises ValueError when the other axes differ (such as another batch), or the dtype or device.
        """
        dim, past = dim % piece.ndim, self.get(name)
        if past is None:
            past = piece.narrow(dim, 0, 0)
        fits = past.shape[:dim] == piece.shape[:dim] and past.shape[dim + 1 :] == piece.shape[dim + 1 :]
        if not fits or past.dtype != piece.dtype or past.device != piece.device:
            raise ValueError(
                f"the past holds {name} of shape {tuple(past.shape)} ({past.dtype}, {past.device}), and this piece has "
                f"{tuple(piece.shape)} ({piece.dtype}, {piece.device}); only axis {dim} may differ"
            )
        if torch.is_grad_enabled():  # autograd may need the old tensor as it was
            room, end, whole = None, 0, torch.cat([past, piece], dim)
        else:
            room, end, whole = self._written(name, past, piece, dim)
        found = whole.shape[dim]
        kept = whole if found <= most else whole.narrow(dim, found - most, most)
        self[name], self._room[name] = kept, (room, kept, end)
        return whole

    def _written(self, name: str, past: Tensor, piece: Tensor, dim: int) -> tuple[Tensor, int, Tensor]:
        m, n = past.shape[dim], piece.shape[dim]
        room, last, end = self._room.get(name, (None, None, 0))
        fresh = room is None or last is not past or end + n > room.shape[dim]
        if fresh or room.is_inference() != torch.is_inference_mode_enabled():
            shape = list(piece.shape)
            shape[dim], end = max(2 * (m + n), 64), m
            room = piece.new_empty(shape)
            room.narrow(dim, 0, m).copy_(past)
        room.narrow(dim, end, n).copy_(piece)
        return room, end + n, room.narrow(dim, end - m, m + n)


class Past:
    """All states of one `remember`: `numbers()` counts them, `select(rows)` chooses rows of the batch."""

    def __init__(self, model: nn.Module):
        self.model, self.states, self.asked, self.depth = model, {}, Counter(), 0
        self.layers = set(_parts(model))

    def state(self, layer: nn.Module) -> State:
        if not self.depth:
            raise ValueError(
                f"{type(layer).__name__} was called outside a pass through the remembered {type(self.model).__name__}; "
                f"remember the part that you call"
            )
        count = self.asked[layer]
        self.asked[layer] = count + 1
        found = self.states.get((layer, count))
        if found is None:
            found = self.states[layer, count] = State()
        return found

    def begin(self, *_) -> None:
        """A pass begins, unless this is a pass within a pass: every layer's questions are counted anew."""
        if self in _open.get():
            if not self.depth:
                self.asked.clear()
            self.depth += 1

    def end(self, *_) -> None:
        if self in _open.get():
            self.depth -= 1

    def __reduce__(self):
        return Past, (nn.Identity(),)  # a copy of a model that is being remembered remembers nothing

    def tensors(self) -> dict[int, Tensor]:
        """Every tensor kept, once each: what two layers share is not counted twice."""
        return {id(t): t for state in self.states.values() for t in state.values() if isinstance(t, Tensor)}

    def numbers(self) -> int:
        """How many numbers are kept in all."""
        plain = sum(not isinstance(t, Tensor) for state in self.states.values() for t in state.values())
        return plain + sum(t.numel() for t in self.tensors().values())

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order, (b',) ids; rows may repeat, as beams need it."""
        chosen = {key: t.index_select(0, rows.to(t.device)) for key, t in self.tensors().items()}
        for state in self.states.values():
            state._room.clear()
            for name, t in state.items():
                state[name] = chosen.get(id(t), t)


def _parts(model: nn.Module):
    """The model and its modules, without those that its `reads_whole` names (the encoder of a translator)."""
    yield model
    for name, part in model.named_children():
        if name not in getattr(model, "reads_whole", ()):
            yield from _parts(part)


def one_pass(model: nn.Module):
    """A context in which one pass through a remembered model does not call its `forward` but another method."""
    return _one_pass(model) if _count else contextlib.nullcontext()


@contextlib.contextmanager
def _one_pass(model: nn.Module):
    pasts = [past for past in _open.get() if past.model is model]
    for past in pasts:
        past.begin()
    try:
        yield
    finally:
        for past in pasts:
            past.end()


@contextlib.contextmanager
def remember(model: nn.Module):
    """Inside, layers of the model keep what they need of earlier tokens; on leaving all of it is forgotten.

    Feed a text in pieces, each with its `start`: the outputs are those of the whole text at once. Yields the `Past`.
    It may be nested, also on one model (the innermost counts), and each thread has its own. Raises ValueError for a
    layer that cannot go on from a past, with its reason.
    """
    global _count
    past = Past(model)
    for name, part in model.named_modules():
        if part in past.layers and (reason := getattr(part, "no_past", None)):
            raise ValueError(f"{name or 'the model'} ({type(part).__name__}) cannot be fed in pieces: {reason}")
    hooks = [model.register_forward_pre_hook(past.begin), model.register_forward_hook(past.end, always_call=True)]
    token = _open.set((*_open.get(), past))
    with _lock:
        _count += 1
    try:
        yield past
    finally:
        with _lock:
            _count -= 1
        _open.reset(token)
        for hook in hooks:
            hook.remove()


def recall(layer: nn.Module) -> State | None:
    """The state of this layer at this place of the pass, a dict that it may read and fill; None outside `remember`.

    Ask the same number of times in every `forward`, whatever the input: questions are told apart by counting.
    """
    if _count:
        for past in reversed(_open.get()):
            if layer in past.layers:
                return past.state(layer)
    return None


def why_not(attend: Callable) -> str | None:
    """Why a layer with this attend function cannot be fed in pieces; None when it can."""
    try:
        return "its attend function sees later tokens" if looks_back(attend) is None else None
    except ValueError as error:
        return str(error)


def with_past(
    layer: nn.Module, attend: Callable, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values (b, h, n, .) and mask as `attend` needs them: inside `remember`, after those of earlier pieces.

    As many earlier tokens are kept as `looks_back(attend)` says. A padding mask (b, 1, 1, n) speaks of this piece and
    is kept with its keys; a mask with a row for each query has to cover all keys, in every piece.
    """
    state = recall(layer)
    back = None if state is None else looks_back(attend)
    if not back:
        return k, v, mask
    n, (k, v) = k.shape[-2], _with_earlier(state, k, v, back)
    before = k.shape[-2] - n
    if mask is None and state.get("masked"):
        raise ValueError(f"earlier pieces came with masks for all keys, so this one needs its own, for {before + n}")
    if mask is not None and (mask.shape[-2] != 1 or mask.shape[-1] != n):  # it speaks of all keys
        state["masked"] = True
        return k, v, mask[..., -(before + n) :]
    if mask is None and "real" not in state:
        return k, v, None
    if mask is None:
        mask = state["real"].new_ones(*state["real"].shape[:-1], n)
    else:
        mask = mask[(None,) * (4 - mask.ndim)].expand(len(k), -1, -1, -1)  # (b, 1, 1, n)
    if "real" not in state and before:
        state.append("real", mask.new_ones(*mask.shape[:-1], before), dim=-1, most=back)
    return k, v, state.append("real", mask, dim=-1, most=back)


def _with_earlier(state: State, k: Tensor, v: Tensor, back: float) -> tuple[Tensor, Tensor]:
    """Earlier keys and values in front of these; in one tensor where they fit, so that a token is written once."""
    if k.shape[:-1] == v.shape[:-1] and k.dtype == v.dtype:
        both = state.append("kv", torch.cat([k, v], -1), most=back)
        return both.split([k.shape[-1], v.shape[-1]], -1)
    return state.append("k", k, most=back), state.append("v", v, most=back)


def looks_back(attend: Callable) -> float | None:
    """How many earlier keys the queries of an attend function read when a text comes in pieces.

    It is what the function says in its attribute `looks_back`: `math.inf` for causal attention, w - 1 for a causal
    window of w tokens, 0 for a module that keeps a state of its own, None for attention that sees later tokens too.
    A function that hands over to another (a partial or module with `attend` or `weigh`) says what that one says.
    Raises ValueError when nothing is said.
    """
    if hasattr(attend, "looks_back"):
        return attend.looks_back
    if isinstance(attend, partial):
        inner = [attend.keywords[name] for name in ("attend", "weigh") if name in attend.keywords]
        return looks_back(inner[0] if inner else attend.func)
    for name in ("attend", "weigh"):
        if hasattr(attend, name):
            return looks_back(getattr(attend, name))
    raise ValueError(
        f"{getattr(attend, '__name__', type(attend).__name__)} does not say which tokens it sees; set its attribute "
        f"looks_back: math.inf for causal attention, w - 1 for a causal window of w tokens, None for attention that "
        f"sees later tokens"
    )


def step_by_step(step: Callable, x: Tensor, state: State) -> Tensor:
    """The tokens of x (b, n, d) one by one: step(token, past) -> (y, past), past a tuple of tensors or None."""
    past, found = tuple(state.values()) or None, [x[:, :0]]
    for token in x.split(1, 1) if x.shape[1] else ():
        y, past = step(token, past)
        found.append(y)
    state.update(enumerate(past or ()))
    return torch.cat(found, 1)

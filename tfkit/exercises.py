"""Exercises that check themselves, and say what is wrong rather than only that something is."""

from __future__ import annotations

import ast
import base64
import inspect
import io
import math
import re
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

OPEN = "Exercise: not attempted yet. Replace the line that raises NotImplementedError, then run both cells again."
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """One thing to try: `make(generator)` returns the arguments, random but the same for every answer.

    hint  is added to the message when this case fails and no known mistake explains it
    """

    name: str
    make: Callable[[torch.Generator], tuple]
    hint: str = ""


@dataclass(frozen=True)
class Result:
    """How an attempt went: status "open", "passed" or "failed", and the message that was printed."""

    status: str
    message: str
    mistakes: Mapping[str, Callable] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return self.status == "passed"

    def __repr__(self) -> str:
        return f"<{self.status}>"

    def _ipython_display_(self) -> None:
        """Nothing: the printed message is all a notebook needs to show."""


def check(
    fn: Callable,
    reference: Callable,
    cases: Sequence[Case],
    *,
    mistakes: Mapping[str, Callable] | None = None,
    atol: float = 1e-5,
) -> Result:
    """Compare `fn` with `reference` on every case and several seeds, and print one message.

    mistakes  maps a message to a wrong function: when an answer is wrong in the same way, it gets that message

    Looked at in turn: does it run, does it leave its inputs alone, are type, shape and values right. Several seeds must
    agree, so an answer cannot pass by luck. An answer that raises NotImplementedError is not attempted yet, not wrong.
    torch's global generator is left as it was found.
    """
    result = judge(fn, reference, cases, mistakes=mistakes, atol=atol)
    print(result.message)
    return result


def judge(
    fn: Callable,
    reference: Callable,
    cases: Sequence[Case],
    *,
    mistakes: Mapping[str, Callable] | None = None,
    atol: float = 1e-5,
) -> Result:
    """What `check` prints, without printing it."""
    mistakes = dict(mistakes or {})
    if not cases:
        raise ValueError("an exercise needs at least one case")
    with torch.random.fork_rng(devices=[]):
        for seed in SEEDS:
            for case in cases:
                try:
                    problem = _attempt(fn, reference, case, seed, mistakes, atol)
                except NotImplementedError:
                    return Result("open", OPEN, mistakes)
                if problem:
                    return Result("failed", f"Not yet ({case.name}): {problem}", mistakes)
    names = ", ".join(case.name for case in cases)
    return Result("passed", f"Passed: {names}, each with {len(SEEDS)} random inputs.", mistakes)


def sample(fn: Callable, example: str) -> None:
    """Try an answer on the one example that students of a course are shown (`tfkit.authoring.coursework` writes it).

    Raises AssertionError that says what is wrong.
    """
    load = lambda: torch.load(io.BytesIO(zlib.decompress(base64.b64decode(example))), weights_only=True)
    given, expected, atol = load()
    case = Case("an example", lambda _: load()[0])
    problem = _attempt(fn, lambda *_: expected, case, 0, {}, atol)
    words = ", ".join(_short(value) for value in given)
    assert not problem, f"Not yet, for the inputs ({words}): {problem}"
    print(f"{fn.__name__} is right for one example; hidden tests try others.")


def attempted(fn: Callable) -> bool:
    """False while a function does nothing but raise NotImplementedError, pass, or return None.

    A `raise NotImplementedError` that was left below the answer does not matter. True where the source is not at hand.
    """
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(fn))).body
        body = [ast.unparse(node) for node in function.body]
    except (OSError, TypeError, ValueError, SyntaxError, AttributeError):
        return True
    body = body[1:] if ast.get_docstring(function) and len(body) > 1 else body
    return not re.fullmatch(r"raise NotImplementedError(\(.*\))?|pass|return( None)?|\.\.\.", body[0], re.S)


def _attempt(fn, reference, case: Case, seed: int, mistakes, atol: float) -> str:
    arguments = lambda: case.make(torch.Generator().manual_seed(seed))
    given = arguments()
    expected = _run(reference, arguments())
    try:
        found = _run(fn, given)
    except NotImplementedError:
        raise
    except Exception as error:
        return f"it stops with {type(error).__name__}: {_short(error)}"
    for before, after in zip(arguments(), given, strict=True):
        if isinstance(before, Tensor) and not torch.equal(before.nan_to_num(), after.nan_to_num()):
            return "it changes its input in place; work on a new tensor (x = x + 1, not x += 1)."
    problem = _difference(found, expected, atol)
    if not problem:
        return ""
    for message, wrong in mistakes.items():
        try:
            same = not _difference(found, _run(wrong, arguments()), atol)
        except Exception:
            same = False
        if same:
            return message
    return problem + (f" {case.hint}" if case.hint else "")


def _run(fn, arguments):
    torch.manual_seed(0)
    return fn(*arguments)


def _difference(found, expected, atol: float) -> str:
    """What is wrong with `found`, or an empty string."""
    if found is None:
        return "it returns None; is there a `return`?"
    if isinstance(expected, (tuple, list)):
        if not isinstance(found, (tuple, list)) or len(found) != len(expected):
            return f"it should return {len(expected)} values, and returns {type(found).__name__} {_short(found)}."
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            if problem := _difference(a, b, atol):
                return f"value {i} of {len(expected)}: {problem}"
        return ""
    if isinstance(expected, Tensor):
        if type(found) not in (Tensor, Parameter):  # a subclass could answer every comparison as it likes
            value = "" if isinstance(found, Tensor) else f" {_short(found)}"
            return f"it should return a tensor, and returns {type(found).__name__}{value}."
        if found.shape != expected.shape:
            return f"the shape should be {tuple(expected.shape)}, and is {tuple(found.shape)}."
        if _kind(found) != _kind(expected):
            return f"the type should be {expected.dtype}, and is {found.dtype}."
        if found.isnan().any() and not expected.isnan().any():
            return "there is nan in the result: look for 0/0, inf - inf or a softmax over nothing."
        wide = torch.complex128 if expected.is_complex() else torch.float64
        gap = (found.to(wide) - expected.to(wide)).abs()
        gap = gap.nan_to_num(nan=math.inf if found.isnan().ne(expected.isnan()).any() else 0.0)
        gap = torch.where(found == expected, 0.0, gap)  # inf == inf
        if gap.numel() and gap.max() > atol:
            at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
            where = f" at {list(at)}" if at else ""
            wrong, right = f"{found[at].item():.4g}", f"{expected[at].item():.4g}"
            return f"the shape is right, the values are not:{where} it is {wrong} where {right} is right."
        return ""
    if isinstance(found, Tensor):
        if found.numel() != 1:
            return f"it should return one {type(expected).__name__}, and the result has shape {tuple(found.shape)}."
        found = found.item()
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return (
            ""
            if math.isclose(found, expected, rel_tol=atol, abs_tol=atol)
            else f"it is {found:.6g} where {expected:.6g} is right."
        )
    found = found.item() if isinstance(found, np.generic) else found
    if type(found) is not type(expected) and type(found) not in (bool, int, float, complex, str):
        return f"it should return one {type(expected).__name__}, and returns {type(found).__name__} {_short(found)}."
    return "" if found == expected else f"it is {_short(found)} where {_short(expected)} is right."


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "int"


def _short(thing) -> str:
    text = re.sub(r"\s+", " ", str(thing))
    return text if len(text) <= 120 else text[:117] + "..."

"""Exercises: open, passed or failed, and a message that names what is wrong."""

import math

import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from tfkit.exercises import OPEN, SEEDS, Case, attempted, check

VALUES = Case("random values", lambda g: (torch.randn(4, 3, generator=g),), hint="Is the sum over the last axis?")
SINGLE = Case("one column", lambda g: (torch.randn(5, 1, generator=g),))
CASES = [VALUES, SINGLE]


def softmax(x):
    return x.softmax(-1)


def attempt(fn, capsys, reference=softmax, cases=CASES, **options):
    result = check(fn, reference, cases, **options)
    assert capsys.readouterr().out == result.message + "\n"
    assert bool(result) == (result.status == "passed") and repr(result) == f"<{result.status}>"
    return result


def failed(fn, capsys, *words, **options):
    result = attempt(fn, capsys, **options)
    assert result.status == "failed" and result.message.startswith("Not yet (")
    for word in words:
        assert word in result.message, f"{word!r} is not in {result.message!r}"


def test_not_attempted(capsys):
    def stub(x):
        raise NotImplementedError("your turn")

    result = attempt(stub, capsys)
    assert result.status == "open" and result.message == OPEN


def test_passed(capsys):
    def answer(x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    result = attempt(answer, capsys)
    assert result.status == "passed"
    assert result.message == "Passed: random values, one column, each with 3 random inputs."


def test_the_result_shows_nothing_but_its_message(capsys):
    result = check(softmax, softmax, CASES)
    capsys.readouterr()
    assert DisplayFormatter().format(result) == ({}, {}) and capsys.readouterr().out == ""


def test_wrong_values_are_located_and_hinted(capsys):
    def off(x):
        y = softmax(x)
        return torch.cat([y[:2], y[2:] + 0.25], 0)

    failed(off, capsys, "Not yet (random values)", "the shape is right, the values are not: at [", "is right.")
    failed(lambda x: x.softmax(0), capsys, "values are not", VALUES.hint)


def test_wrong_shape_type_none_and_nan(capsys):
    failed(lambda x: softmax(x).T, capsys, "the shape should be (4, 3), and is (3, 4).")
    failed(lambda x: softmax(x).tolist(), capsys, "should return a tensor, and returns list [[")
    failed(lambda x: softmax(x).round().long(), capsys, "the type should be torch.float32, and is torch.int64.")
    failed(lambda x: None, capsys, "it returns None; is there a `return`?")
    failed(lambda x: softmax(x) / 0 * 0, capsys, "there is nan")
    failed(lambda x: softmax(x) * math.inf, capsys, "it is inf where")
    assert attempt(lambda x: softmax(x).double(), capsys)


def test_masks_must_be_boolean(capsys):
    mask = lambda x: x > 0
    failed(lambda x: (x > 0).long(), capsys, "the type should be torch.bool, and is torch.int64.", reference=mask)
    failed(lambda x: x <= 0, capsys, "values are not", reference=mask)
    assert attempt(lambda x: ~(x <= 0), capsys, reference=mask)


def test_infinite_nan_and_complex_values_are_compared(capsys):
    masked = lambda x: x.masked_fill(x > 0, -math.inf)
    assert attempt(lambda x: torch.where(x > 0, -math.inf, x), capsys, reference=masked)
    failed(lambda x: x.masked_fill(x > 0, -1e9), capsys, "where -inf is right", reference=masked)
    empty = lambda x: x.masked_fill(x > 0, math.nan)
    assert attempt(lambda x: torch.where(x > 0, math.nan, x), capsys, reference=empty)
    failed(lambda x: x, capsys, "nan is right", reference=empty)
    turn = lambda x: torch.polar(torch.ones_like(x), x)
    assert attempt(lambda x: torch.complex(x.cos(), x.sin()), capsys, reference=turn)
    failed(lambda x: turn(-x), capsys, "values are not", reference=turn)
    failed(lambda x: x.cos(), capsys, "the type should be torch.complex64", reference=turn)


def test_an_answer_that_stops(capsys):
    failed(lambda x: x @ x, capsys, "it stops with RuntimeError: mat1 and mat2")
    failed(lambda: 1, capsys, "it stops with TypeError")

    def long(x):
        raise ValueError("far too long\n " * 50)

    result = attempt(long, capsys)
    assert "\n" not in result.message and len(result.message) < 200 and result.message.endswith("...")


def test_an_answer_that_changes_its_input(capsys):
    def inplace(x):
        return x.sub_(x.amax(-1, keepdim=True)).softmax(-1)

    failed(inplace, capsys, "changes its input in place")
    holes = Case("holes", lambda g: (torch.tensor([1.0, math.nan, -math.inf]),))
    assert attempt(lambda x: x + 1, capsys, reference=lambda x: 1 + x, cases=[holes])


def test_known_mistakes_get_their_message(capsys):
    mistakes = {
        "You divided by the first axis.": lambda x: x.softmax(0),
        "It stops itself.": lambda x: 1 / 0,
        "You forgot to normalize.": lambda x: x.exp(),
    }
    failed(lambda x: torch.exp(x), capsys, "Not yet (random values): You forgot to normalize.", mistakes=mistakes)
    failed(lambda x: x.softmax(0), capsys, "You divided by the first axis.", mistakes=mistakes)
    failed(lambda x: x, capsys, "values are not", VALUES.hint, mistakes=mistakes)
    assert attempt(softmax, capsys, mistakes=mistakes).mistakes == mistakes


def test_an_edge_case_is_named(capsys):
    def squeezes(x):
        return softmax(x).squeeze()

    failed(squeezes, capsys, "Not yet (one column): the shape should be (5, 1), and is (5,).")


def test_luck_with_one_seed_is_not_enough(capsys):
    first = [case.make(torch.Generator().manual_seed(SEEDS[0]))[0] for case in CASES]
    remembered = lambda x: softmax(x) if any(torch.equal(x, y) for y in first) else x
    assert len(SEEDS) > 1
    failed(remembered, capsys, "Not yet (random values)")


def test_random_answers_are_compared_under_the_same_seed(capsys):
    drop = lambda x: torch.nn.functional.dropout(x, 0.5)
    assert attempt(lambda x: torch.nn.functional.dropout(1 * x, 0.5), capsys, reference=drop)


def test_several_values(capsys):
    pair = lambda x: (x.amax(-1), x.argmax(-1))
    assert attempt(lambda x: list(x.max(-1)), capsys, reference=pair)
    failed(lambda x: x.amax(-1), capsys, "should return 2 values, and returns Tensor", reference=pair)
    failed(lambda x: (x.amax(-1),), capsys, "should return 2 values", reference=pair)
    failed(lambda x: (x.amax(-1), x.argmin(-1)), capsys, "value 1 of 2: the shape is right", reference=pair)
    failed(lambda x: (x.amax(-1), None), capsys, "value 1 of 2: it returns None", reference=pair)


def test_plain_numbers_and_words(capsys):
    mean = lambda x: x.mean().item()
    assert attempt(lambda x: sum(x.flatten().tolist()) / x.numel(), capsys, reference=mean)
    assert attempt(lambda x: x.mean(), capsys, reference=mean)
    failed(lambda x: x.sum().item(), capsys, "it is ", " is right.", reference=mean)
    failed(lambda x: x.mean(0), capsys, "should return one float, and the result has shape (3,)", reference=mean)
    failed(lambda x: "many", capsys, "it is many where 12 is right.", reference=lambda x: x.numel(), cases=[VALUES])
    failed(lambda x: x > 0, capsys, "should return one bool", reference=lambda x: True)
    assert attempt(lambda x: 12, capsys, reference=lambda x: x.numel(), cases=[VALUES])


def test_tolerance(capsys):
    failed(lambda x: softmax(x) + 1e-3, capsys, "values are not")
    assert attempt(lambda x: softmax(x) + 1e-3, capsys, atol=1e-2)


def test_an_exercise_needs_cases():
    with pytest.raises(ValueError, match="at least one case"):
        check(softmax, softmax, [])


def test_the_global_generator_is_left_as_it_was():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    check(lambda x: torch.randn(3) + softmax(x), softmax, CASES)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_answer_that_only_says_it_is_equal(capsys):
    class Yes:
        __eq__ = lambda self, other: True
        __hash__ = None

    class Number(int):
        __eq__ = lambda self, other: True
        __hash__ = int.__hash__

    class Always(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return torch.zeros(())

    size = lambda x: x.numel()
    for answer in (Yes(), Number(3)):
        failed(lambda x, answer=answer: answer, capsys, "should return one int", reference=size)
    failed(lambda x: torch.rand(x.shape).as_subclass(Always), capsys, "should return a tensor, and returns Always")
    assert attempt(lambda x: np.int64(x.numel()), capsys, reference=size)
    assert attempt(lambda x: torch.nn.Parameter(x.softmax(-1)), capsys)


def stub(x):
    """What to do."""
    raise NotImplementedError("your turn")


def nothing(x):
    return None


def left_below(x):
    return x
    raise NotImplementedError()


def test_attempted_looks_at_what_a_function_does_first():
    assert not attempted(stub) and not attempted(nothing)
    assert attempted(left_below) and attempted(len) and attempted(softmax)

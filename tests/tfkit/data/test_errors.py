"""Bad arguments raise a ValueError that names the value."""

import pytest
import torch  # noqa: F401  the calls below use it

from tfkit import data as D  # noqa: F401


@pytest.mark.parametrize("call, value", [
    ("digits(test=1.5)", "1.5"), ("digits(test=0.0)", "0"), ("photograph('dog')", "dog"), ("series('rain')", "rain"),
    ("text('latin')", "latin"), ("corpus(validation=2.0)", "2"), ("copy(0, 3)", "0"), ("reverse(2, -1)", "-1"),
    ("sort(2, 3, symbols=1)", "1"), ("parity(-2, 3)", "-2"), ("modular_addition(1)", "1"), ("induction(3, 0)", "0"),
    ("associative_recall(3, 17)", "17"), ("associative_recall(0, 3)", "0"), ("listops(3, length=3)", "3"),
    ("listops(0)", "0"), ("translation(0)", "0"), ("windows(torch.arange(4), 4, 2)", "4"),
    ("picture('dog')", "dog"), ("photograph('cat', 0, 5)", "0"), ("crops(1005)", "1005"), ("crops(0)", "0"),
    ("crops(size=48)", "48"), ("faces(test=1.0)", "1.0"), ("faces(0)", "0"), ("colored_digits(contrast=1.5)", "1.5"),
    ("patches(0)", "0"), ("patches(3, part='all')", "all"), ("patches(3, names=['dog'])", "dog"),
    ("patches(3, names=[])", ""), ("patches(3, names=['microaneurysms'])", "102"), ("patches(3, size=5)", "5"),
    ("color_jitter(torch.rand(1, 3, 2, 2), strength=-1)", "-1"),
])  # fmt: skip
def test_errors_name_the_value(call, value):
    with pytest.raises(ValueError, match=rf"(?<![\d]){value}\b"):
        result = eval(f"D.{call}")
        next(result)

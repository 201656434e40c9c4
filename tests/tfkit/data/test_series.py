"""Series: documented lengths and units."""

import pytest
import torch

from tfkit import data as D


@pytest.mark.parametrize(
    "name, t, columns", [("sunspots", 309, 1), ("co2", 2284, 1), ("elnino", 732, 1), ("macro", 203, 5)]
)
def test_series(name, t, columns):
    values = D.series(name)
    assert values.shape == (t, columns) and values.dtype == torch.float32 and values.isfinite().all()
    expected = values.clone()
    values.zero_()  # what a reader does to it must not reach the next reader
    assert torch.equal(D.series(name), expected)


def test_series_have_the_documented_units():
    assert 0 <= D.series("sunspots").min() and D.series("sunspots").max() < 300
    assert 310 < D.series("co2").min() and D.series("co2").max() < 380
    assert 15 < D.series("elnino").min() and D.series("elnino").max() < 32

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


@pytest.mark.parametrize(
    "name, t, columns", [("nile", 100, 1), ("equipment", 257, 1), ("eeg", 800, 4), ("stock", 1047, 2)]
)
def test_more_series(name, t, columns):
    values = D.series(name)
    assert values.shape == (t, columns) and values.dtype == torch.float32 and values.isfinite().all()


def test_known_values():
    assert D.series("nile")[0] == 1120 and D.series("stock")[0, 0] == pytest.approx(100.34)
    assert D.series("eeg").abs().max() < 5.3


def test_forecast_windows_do_not_leak():
    """On the series 0, 1, 2, ... every value is its own time, so each window says which times it saw."""
    values = torch.arange(200.0).unsqueeze(1)
    parts = D.forecast(values, context=12, horizon=5, shares=(0.6, 0.2))
    limits = [(0, 120), (120, 160), (160, 200)]
    for part, (low, high) in zip(parts, limits, strict=True):
        x, y = (torch.round(v * part.scale + part.mean)[..., 0].long() for v in (part.x, part.y))
        assert torch.equal(x, part.origin[:, None] - 12 + torch.arange(12))
        assert torch.equal(y, part.origin[:, None] + torch.arange(5))
        assert y.min() == max(low, 12) and y.max() == high - 1  # every value of the part is asked for, the last too
        assert (x < y[:, :1]).all()
        assert torch.allclose(part.mean, values[:120].mean(0)) and torch.allclose(part.scale, values[:120].std(0))
    changed = values.clone()
    changed[120:] = 1e6  # whatever follows the training part: training does not change
    for a, b in zip(parts[0], D.forecast(changed, 12, 5, (0.6, 0.2))[0], strict=True):
        assert torch.equal(a, b)
    assert len(D.forecast(values, 12, 5, (0.6, 0.2), stride=5)[2].x) == 8


def test_events_come_at_their_intensity():
    """Time rescaling: the compensator between events is exponential with mean 1, also without a jump, and only then."""
    for jump in (0.0, 0.6):
        e = D.events(60, until=60.0, base=0.8, jump=jump, decay=1.5)
        assert torch.equal(e.times[~e.mask], torch.full_like(e.times[~e.mask], 60.0)) and e.times[e.mask].max() < 60
        assert (e.times.diff(dim=1) >= 0).all()
        due = D.compensator(e.times, e.times, 0.8, jump, 1.5)
        gaps = due.diff(dim=1, prepend=torch.zeros(60, 1, dtype=torch.float64))[e.mask]
        level = (1 - (-gaps).exp()).sort().values
        distance = (level - (torch.arange(len(gaps)) + 0.5) / len(gaps)).abs().max()
        assert distance < 1.6 / len(gaps) ** 0.5  # Kolmogorov and Smirnov's bound at 1%
    plain = (
        (e.times.diff(dim=1, prepend=torch.zeros(60, 1, dtype=torch.float64))[e.mask] * 0.8 / (1 - 0.4)).sort().values
    )
    wrong = (1 - (-plain).exp() - (torch.arange(len(plain)) + 0.5) / len(plain)).abs().max()
    assert wrong > 3 / len(plain) ** 0.5  # as a Poisson process of the same rate it fails


def test_how_many_events_come():
    e = D.events(400, until=40.0, base=0.5, jump=0.5, decay=1.0)
    total = D.compensator(e.times, torch.full((400, 1), 40.0), 0.5, 0.5, 1.0)
    counts = e.mask.sum(1)
    assert abs(float(counts.double().mean() - total.mean())) < 1.5  # as many as were due
    assert 0.85 < float(counts.double().mean()) / (40 * 0.5 / (1 - 0.5)) < 1.0  # the stationary rate, less the start
    assert torch.equal(e.times, D.events(400, 40.0, 0.5, 0.5, 1.0).times)
    assert not torch.equal(e.mask.sum(1), D.events(400, 40.0, 0.5, 0.5, 1.0, seed=1).mask.sum(1))


def test_the_compensator_is_the_integral_of_the_intensity():
    times = torch.tensor([[1.0, 1.5, 4.0]], dtype=torch.float64)
    t = torch.linspace(0, 6, 60_001, dtype=torch.float64)
    past = t[:, None] > times
    rate = 0.3 + 0.7 * torch.where(past, (-1.2 * (t[:, None] - times).clamp(min=0)).exp(), 0.0).sum(1)
    assert torch.allclose(torch.trapezoid(rate, t), D.compensator(times, t[None, -1:], 0.3, 0.7, 1.2)[0, 0], rtol=1e-4)

"""Time series, real and generated, windows on them that cannot leak, and streams of events with a known intensity."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tfkit.data._base import at_least, folder, generator, one_of

__all__ = ["SERIES", "Events", "Forecast", "compensator", "events", "forecast", "series"]

# name: (statsmodels data set, columns, what it is)
SERIES = {
    "sunspots": ("sunspots", ["SUNACTIVITY"], "yearly sunspot numbers, 1700 to 2008"),
    "co2": ("co2", ["co2"], "weekly carbon dioxide at Mauna Loa in ppm, 1958 to 2001, gaps filled linearly"),
    "elnino": ("elnino", None, "monthly sea-surface temperature off Peru in degrees Celsius, 1950 to 2010"),
    "macro": ("macrodata", "realgdp realcons realinv unemp infl".split(), "quarterly US economy, 1959 to 2009"),
    "nile": ("nile", ["volume"], "yearly flow of the Nile at Aswan in 10^8 cubic meters, 1871 to 1970"),
    "equipment": (
        "elec_equip",
        None,
        "monthly turnover of electrical equipment in the euro area, an index, 257 months",
    ),
    "eeg": (None, None, "brain waves of four electrodes, 800 samples in 10 s, from matplotlib"),
    "stock": (None, ["close", "volume"], "a share's daily close in dollars and volume, 2004 to 2008, from matplotlib"),
}


def series(name: str = "sunspots") -> Float[Tensor, "t columns"]:
    """A real time series stored inside statsmodels or matplotlib, float32; `SERIES` lists names, columns and units.

    Raises ValueError for another name.
    """
    one_of("series", name, SERIES)
    dataset, columns, _ = SERIES[name]
    if dataset is None:
        sample = folder("matplotlib") / "mpl-data/sample_data"
        if name == "eeg":
            return torch.from_numpy(np.fromfile(sample / "eeg.dat").reshape(800, 4).astype(np.float32))
        with np.load(sample / "goog.npz") as stored:
            table = stored["price_data"]
        return torch.from_numpy(np.stack([table[c].astype(np.float32) for c in columns], 1))
    frame = importlib.import_module(f"statsmodels.datasets.{dataset}").load_pandas().data
    if name == "elnino":  # one row per year, one column per month
        return torch.tensor(frame.iloc[:, 1:].to_numpy().reshape(-1, 1), dtype=torch.float32)
    frame = (frame if columns is None else frame[columns]).astype(float).interpolate()
    return torch.tensor(frame.to_numpy(), dtype=torch.float32)


class Forecast(NamedTuple):
    """Windows of one part, scaled: what is known (b, context, columns), what follows (b, horizon, columns).

    `origin` is the time of the first value to forecast. Values in the units of the series are x * scale + mean, both
    taken from the training part alone.
    """

    x: Float[Tensor, "b context columns"]
    y: Float[Tensor, "b horizon columns"]
    origin: Tensor
    mean: Float[Tensor, "columns"]
    scale: Float[Tensor, "columns"]


def forecast(
    values: Float[Tensor, "t columns"], context: int, horizon: int,
    shares: tuple[float, float] = (0.7, 0.15), stride: int = 1,
) -> tuple[Forecast, Forecast, Forecast]:  # fmt: skip
    """Windows for training, validation and testing that do not leak: the parts follow each other in time.

    Every value to forecast lies inside its own part, and no training window reaches beyond the training part. What is
    known at an origin may reach back into the part before, as it would in use. Mean and deviation are those of the
    training part. All windows are kept, the last too. `shares` are those of training and validation, the rest tests.
    Raises ValueError when a value is missing (NaN), or a part is too short for one window.
    """
    at_least(1, context=context, horizon=horizon, stride=stride)
    if values.ndim != 2 or not values.isfinite().all():
        raise ValueError(f"values must be (t, columns) without NaN, got {tuple(values.shape)}; fill the gaps first")
    if not (min(shares) > 0 and sum(shares) < 1):
        raise ValueError(f"shares must be positive and leave something for testing, got {shares}")
    t = len(values)
    cuts = [0, round(t * shares[0]), round(t * sum(shares)), t]
    train = values[: cuts[1]]
    mean, scale = train.mean(0), train.std(0).clamp(min=1e-8)
    scaled, parts = (values - mean) / scale, []
    for name, low, high in zip(("training", "validation", "test"), cuts, cuts[1:], strict=False):
        first = max(low, context)
        origin = torch.arange(first, max(first, high - horizon + 1), stride)
        if not len(origin):
            raise ValueError(f"the {name} part, {low} to {high}, has no window of {context} and {horizon} values")
        look = lambda first, length: scaled[first.unsqueeze(1) + torch.arange(length)]
        parts.append(Forecast(look(origin - context, context), look(origin, horizon), origin, mean, scale))
    return tuple(parts)


class Events(NamedTuple):
    """Times of events in order, and a mask, True where there is one; times beyond the last are `until`."""

    times: Float[Tensor, "b n"]
    mask: Bool[Tensor, "b n"]
    until: float


def events(
    count: int, until: float = 50.0, base: float = 0.5, jump: float = 0.4, decay: float = 1.0, seed: int = 0
) -> Events:
    """A self-exciting (Hawkes) process: intensity base + jump * sum over past events of exp(-decay * (t - t_i)).

    Each event brings about jump / decay others, on average; without a jump it is the Poisson process. Simulated
    exactly, by thinning; float64. Raises ValueError unless base, decay and until are positive and 0 <= jump < decay.
    """
    at_least(1, count=count)
    at_least(1e-9, until=until, base=base, decay=decay)
    if not 0 <= jump < decay:
        raise ValueError(f"jump must be at least 0 and below decay = {decay}, or events never end; got {jump}")
    rng = generator(seed)
    now, excess = torch.zeros(2, count, dtype=torch.float64)  # excess: intensity above the base
    drawn, kept = [], []
    while bool((now < until).any()):
        bound = base + excess  # the intensity only falls until the next event
        wait, coin = torch.rand(2, count, generator=rng, dtype=torch.float64)
        wait = -(1 - wait).log() / bound
        now, excess = now + wait, excess * (-decay * wait).exp()
        happens = (coin * bound < base + excess) & (now < until)
        excess = excess + jump * happens
        drawn.append(now)
        kept.append(happens)
    times, mask = torch.stack(drawn, 1), torch.stack(kept, 1)
    longest = max(1, int(mask.sum(1).max()))
    times = torch.where(mask, times, until).sort(1).values[:, :longest]
    return Events(times, torch.arange(longest) < mask.sum(1, keepdim=True), until)


def compensator(
    times: Float[Tensor, "b n"], at: Float[Tensor, "b m"], base: float, jump: float, decay: float
) -> Float[Tensor, "b m"]:
    """The integral of the intensity of `events` from 0 to each time in `at`: how many events are due by then.

    Between true events its increments are exponential with mean 1. Times beyond `at` do not count.
    """
    gap = (at.unsqueeze(2) - times.unsqueeze(1)).clamp(min=0)  # (b, m, n)
    return base * at + jump / decay * (1 - (-decay * gap).exp()).sum(2)

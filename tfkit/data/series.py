"""Real time series, stored inside installed packages."""

from __future__ import annotations

import importlib

import torch
from jaxtyping import Float
from torch import Tensor

from tfkit.data._base import one_of

__all__ = ["SERIES", "series"]

# name: (statsmodels data set, columns, what it is)
SERIES = {
    "sunspots": ("sunspots", ["SUNACTIVITY"], "yearly sunspot numbers, 1700 to 2008"),
    "co2": (
        "co2",
        ["co2"],
        "weekly atmospheric carbon dioxide at Mauna Loa in ppm, 1958 to 2001, gaps filled linearly",
    ),
    "elnino": ("elnino", None, "monthly sea-surface temperature off Peru in degrees Celsius, 1950 to 2010"),
    "macro": (
        "macrodata",
        ["realgdp", "realcons", "realinv", "unemp", "infl"],
        "quarterly US economy, 1959 to 2009, five columns",
    ),
}


def series(name: str = "sunspots") -> Float[Tensor, "t columns"]:
    """A real time series stored inside statsmodels: "sunspots", "co2", "elnino" or "macro". Units: see
    `tfkit.data.SERIES`.
    """
    one_of("series", name, SERIES)
    dataset, columns, _ = SERIES[name]
    frame = importlib.import_module(f"statsmodels.datasets.{dataset}").load_pandas().data
    if name == "elnino":  # one row per year, one column per month
        return torch.tensor(frame.iloc[:, 1:].to_numpy().reshape(-1, 1), dtype=torch.float32)
    frame = frame[columns].astype(float).interpolate()
    return torch.tensor(frame.to_numpy(), dtype=torch.float32)

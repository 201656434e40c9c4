"""What the chapters draw: attention maps, matrices, curves and costs; and schematics of boxes, arrows and cells.

Style, palette and `show` come from `tfkit.figures`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from tfkit.figures import COLORS, STYLE, contents, figure, place, png, show, tell_apart

__all__ = ["COLORS", "STYLE", "Diagram", "Part", "attention_map", "cells", "contents", "cost", "curve", "figure",
           "heads", "images", "mask", "matrix", "place", "png", "show", "tell_apart", "tint"]  # fmt: skip
DARK = "#262626"  # outlines and arrows


@contextmanager
def _axes(ax, **size):
    """The given axes, or new ones, drawn upon in the house style."""
    if ax is None:
        _, ax = figure(**size)
    with matplotlib.rc_context(STYLE):
        yield ax


def _array(values) -> np.ndarray:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)


def attention_map(
    weights, rows: Sequence[str] = (), columns: Sequence[str] = (), ax=None, title: str = "", limit: float | None = None
):
    """One attention map (n, m): queries down, keys across, dark 0, bright `limit` (its maximum). Returns the axes."""
    weights = _array(weights)
    if weights.ndim != 2:
        raise ValueError(f"an attention map has two dimensions (queries, keys), got {weights.shape}")
    with _axes(ax, width=4.2, height=3.8) as ax:
        aspect = "auto" if max(weights.shape) > 40 else "equal"
        ax.imshow(weights, vmin=0, vmax=limit or weights.max() or 1, cmap="viridis", aspect=aspect)
        _token_labels(ax, rows, columns, weights.shape, title)
    return ax


def _token_labels(ax, rows: Sequence[str], columns: Sequence[str], shape: tuple[int, int], title: str) -> None:
    for name, labels, size in (("rows", rows, shape[0]), ("columns", columns, shape[1])):
        if len(labels) not in (0, size):
            raise ValueError(f"{name}: {len(labels)} labels for {size} tokens")
    turn = 60 if any(len(c) > 2 for c in columns) else 0
    ax.set_xticks(range(len(columns)), [_visible(c) for c in columns], rotation=turn, fontsize=8)
    ax.set_yticks(range(len(rows)), [_visible(r) for r in rows], fontsize=8)
    ax.set(xlabel="key (looked at)", ylabel="query (looking)", title=title)
    ax.spines[:].set_visible(False)


def heads(weights, tokens: Sequence[str] = (), titles: Sequence[str] = (), columns: int = 4, keys: Sequence[str] = ()):
    """The attention maps of several heads (h, n, m) side by side on one color scale; returns the figure.

    `tokens` labels queries and keys; where they differ, as in cross-attention, `keys` labels the keys.
    """
    weights = _array(weights)
    if weights.ndim != 3:
        raise ValueError(f"maps of several heads have shape (heads, queries, keys), got {weights.shape}")
    if tokens and not keys and weights.shape[1] != weights.shape[2]:
        raise ValueError(f"{weights.shape[1]} queries see {weights.shape[2]} keys: pass labels for both, "
                         "heads(weights, tokens=queries, keys=keys)")  # fmt: skip
    count, columns = len(weights), min(columns, len(weights))
    rows = -(-count // columns)
    fig, grid = figure(rows, columns, width=2.6 * columns + 0.4, height=2.7 * rows, squeeze=False)
    for ax in grid.flat[count:]:
        ax.axis("off")
    for i, ax in enumerate(grid.flat[:count]):
        title = titles[i] if titles else f"head {i}"
        attention_map(weights[i], tokens, keys or tokens, ax, title, limit=weights.max())
        if i % columns:
            ax.set_ylabel("")
    return fig


def matrix(values, ax=None, title: str = "", rows: Sequence[str] = (), columns: Sequence[str] = (), digits: int = 2):
    """A small matrix with its numbers written in: blue negative, white zero, orange positive. Returns the axes."""
    values = np.atleast_2d(_array(values))
    if values.size > 200:
        raise ValueError(f"matrix() writes every number, and {values.shape} has {values.size}; use attention_map")
    with _axes(ax, width=0.62 * values.shape[1] + 1.2, height=0.42 * values.shape[0] + 0.8) as ax:
        limit = np.nanmax(np.abs(values[np.isfinite(values)]), initial=0) or 1
        shown = np.nan_to_num(values, neginf=-limit, posinf=limit)
        ax.imshow(shown, cmap=_signed(), vmin=-limit, vmax=limit, aspect="auto")
        for (i, j), v in np.ndenumerate(values):
            ax.text(j, i, f"{v:.{digits}f}".replace("-inf", "-\u221e"), ha="center", va="center", fontsize=8)
        ax.set_xticks(range(len(columns)), [_visible(c) for c in columns], fontsize=8)
        ax.set_yticks(range(len(rows)), [_visible(r) for r in rows], fontsize=8)
        ax.set_title(title)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    return ax


def _signed():
    return matplotlib.colors.LinearSegmentedColormap.from_list("signed", ["#56B4E9", "white", "#E69F00"])


def curve(x: Iterable[float], y: Iterable[float], ax=None, label: str = "", xlabel: str = "", ylabel: str = "",
          smooth: float = 0.0, **style):  # fmt: skip
    """A line; with `smooth` in (0, 1) its exponential average, and the raw values faint behind it. Returns the axes."""
    x, y = list(x), _array(list(y))
    with _axes(ax) as ax:
        if smooth and len(y) > 10:
            average, mean = [], float(y[: max(1, round(1 / (1 - smooth)) // 2)].mean())
            for value in y:
                mean = smooth * mean + (1 - smooth) * value
                average.append(mean)
            (line,) = ax.plot(x, average, label=label, **style)
            ax.plot(x, y, color=line.get_color(), alpha=0.25, lw=0.8)
        else:
            ax.plot(x, y, label=label, **style)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if label:
            ax.legend()
    return ax


def cost(sizes: Sequence[float], values: Mapping[str, Sequence[float]], ax=None, xlabel: str = "tokens",
         ylabel: str = "time (s)"):  # fmt: skip
    """Cost against size on two logarithmic axes, each line labelled with its fitted exponent. Returns the axes."""
    from tfkit.measure import growth

    with _axes(ax) as ax:
        for marker, (name, line) in zip(itertools.cycle("os^Dv*Px"), values.items(), strict=False):
            ax.loglog(sizes, line, marker=marker, ms=5, label=f"{name}: size^{growth(sizes, line).exponent:.2f}")
        ax.set_xticks(sizes, [f"{s:g}" for s in sizes])
        ax.minorticks_off()
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.legend()
    return ax


def images(batch, titles: Sequence[str] = (), columns: int = 8):
    """Images (b, c, H, W) in a grid, gray or RGB, dark is 0; returns the figure."""
    batch = torch.as_tensor(batch).detach().cpu().float()
    columns = min(columns, len(batch))
    rows = -(-len(batch) // columns)
    fig, grid = figure(rows, columns, width=0.9 * columns, height=(1.1 if titles else 0.9) * rows, squeeze=False)
    for i, ax in enumerate(grid.flat):
        ax.axis("off")
        if i < len(batch):
            ax.imshow(batch[i].permute(1, 2, 0).clamp(0, 1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set_title(titles[i] if titles else "", fontsize=8)
    return fig


def tint(group: int | None) -> tuple[float, float, float]:
    """The palette's color of this number, pale enough for black text upon it; white for None and -1."""
    if group is None or group < 0:
        return (1.0, 1.0, 1.0)
    return tuple(0.4 * c + 0.6 for c in matplotlib.colors.to_rgb(COLORS[group % len(COLORS)]))


class Part(NamedTuple):
    """Where a part of a diagram lies: its middle, width and height in inches."""

    x: float
    y: float
    width: float
    height: float

    def road(self, to: Part, over: float, beside: float) -> list[tuple[float, float]]:
        """The corners of a road from the edge of this part to the edge of another; see `Diagram.arrow`."""
        if over:
            edge = lambda part: part.y + math.copysign(part.height / 2, over)
            y = (max if over > 0 else min)(edge(self), edge(to)) + over
            return [(self.x, edge(self)), (self.x, y), (to.x, y), (to.x, edge(to))]
        if beside:
            edge = lambda part: part.x + math.copysign(part.width / 2, beside)
            x = (max if beside > 0 else min)(edge(self), edge(to)) + beside
            return [(edge(self), self.y), (x, self.y), (x, to.y), (edge(to), to.y)]
        across, up = to.x - self.x, to.y - self.y
        if abs(across) - (self.width + to.width) / 2 >= abs(up) - (self.height + to.height) / 2:
            edge = lambda part, sign: (part.x + math.copysign(part.width / 2, sign * across), part.y)
        else:
            edge = lambda part, sign: (part.x, part.y + math.copysign(part.height / 2, sign * up))
        return [edge(self, 1), edge(to, -1)]


class Diagram:
    """A schematic: boxes, signs in circles and grids of cells, joined by arrows, on a figure that fits what was drawn.

    One unit is one inch, so text keeps its size. A part lies with its middle `at` a point (the origin unless told), or
    beside an earlier one: `right=`, `left=`, `above=` or `below=` it, `gap` away and moved sideways by `shift`. Colors
    are numbers of the palette, drawn pale under black text.

        d = Diagram()
        x = d.box("tokens")
        norm = d.box("norm", above=x, gap=0.6)
        mixer = d.box("attention", above=norm, color=0, copies=3)
        plus = d.box("+", above=mixer)
        d.arrow(x, norm, "(b, n, d)", mixer, plus)  # a text names the stretch before it
        d.arrow(x, plus, beside=0.5)                # the residual road
        d.frame([norm, mixer, plus], "12 times")
        show(d.figure, alt="A block: the sum adds what attention makes of the normed tokens to the tokens.")
    """

    def __init__(self):
        self._figure, self._ax = figure(width=2, height=2)
        self._figure.set_layout_engine("none")
        self._ax.set(position=(0, 0, 1, 1), xlim=(0, 2), ylim=(0, 2))
        self._ax.axis("off")

    @property
    def figure(self):
        """The figure, cut to what has been drawn so far."""
        extents = [part.get_window_extent() for part in (*self._ax.patches, *self._ax.texts)]
        seen = matplotlib.transforms.Bbox.union(extents)
        (left, low), (right, top) = self._ax.transData.inverted().transform(seen) + [[-0.1, -0.1], [0.1, 0.1]]
        self._ax.set(xlim=(left, right), ylim=(low, top))
        self._figure.set_size_inches(right - left, top - low)
        return self._figure

    def box(self, text: str, *, color: int | None = None, size: tuple[float, float] | None = None, copies: int = 1,
            **place) -> Part:  # fmt: skip
        """A box around `text`, or a circle around one sign such as "+"; `copies` lie behind each other, as heads do."""
        words, sign = self.note(text, (0, 0)), len(text) == 1
        seen = words.get_window_extent()
        fitting = (0.3, 0.3) if sign else (max(0.8, seen.width / 80 + 0.24), seen.height / 80 + 0.22)
        part = self._part(*(size or fitting), **place)
        words.set_position((part.x, part.y))
        corners = f"round,pad=0,rounding_size={part.height / 2 if sign else 0.06}"
        for shift in [0.06 * i for i in reversed(range(copies))]:
            low = part.x - part.width / 2 + shift, part.y - part.height / 2 + shift
            patch = matplotlib.patches.FancyBboxPatch(low, part.width, part.height, corners)
            self._ax.add_patch(patch).set(fc=tint(color), ec=DARK, lw=1.2, zorder=2, clip_on=False)
        return part

    def cells(self, groups, *, labels: Iterable[str] | None = None, side: float = 0.32, **place) -> Part:
        """A row or grid of cells (tokens, patches, windows), colored by group number; -1 is white.

        `labels` gives a text for each cell; without it each cell shows the number of its group.
        """
        groups = np.atleast_2d(_array(groups).astype(int))
        texts = ["" if g < 0 else str(g) for g in groups.flat] if labels is None else list(labels)
        if len(texts) != groups.size:
            raise ValueError(f"cells: {len(texts)} labels for {groups.size} cells of shape {groups.shape}")
        part = self._part(side * groups.shape[1], side * groups.shape[0], **place)
        for ((i, j), group), text in zip(np.ndenumerate(groups), texts, strict=True):
            x, y = part.x - part.width / 2 + j * side, part.y + part.height / 2 - (i + 1) * side
            cell = plt.Rectangle((x, y), side, side, fc=tint(group), ec=DARK, lw=0.8, zorder=2, clip_on=False)
            self._ax.add_patch(cell)
            self.note(_visible(text), (x + side / 2, y + side / 2), size=8)
        return part

    def arrow(self, start: Part, *stops: Part | str, over: float = 0, beside: float = 0, dashed: bool = False) -> None:
        """Arrows from part to part to part; a text after a part names the stretch that ends there.

        `over` leads a road around what lies between, so many inches above it (negative: below); `beside` leads it
        around at the right (negative: left).
        """
        if not stops or isinstance(stops[0], str) or isinstance(start, str):
            raise ValueError(f"an arrow leads from a part to a part, and texts follow parts; got {(start, *stops)}")
        for stop, text in zip(stops, [*stops[1:], ""], strict=True):
            if not isinstance(stop, str):
                self._road(start.road(stop, over, beside), text if isinstance(text, str) else "", dashed)
                start = stop

    def _road(self, corners: list, text: str, dashed: bool) -> None:
        path = matplotlib.path.Path(corners)
        arrow = matplotlib.patches.FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=10)
        self._ax.add_patch(arrow).set(color=DARK, lw=1.2, linestyle="--" if dashed else "-", zorder=1, clip_on=False)
        if text:
            a, b = max(itertools.pairwise(corners), key=lambda ends: math.dist(*ends))
            flat, steep = math.isclose(a[1], b[1]), math.isclose(a[0], b[0])
            ground = {"bbox": {"fc": "white", "ec": "none", "pad": 1}}
            place = {"va": "bottom"} if flat else {"ha": "left"} if steep else ground
            self.note(text, np.add(a, b) / 2 + (0.07 * steep, 0.03 * flat), size=8, **place)

    def frame(self, parts: Sequence[Part], text: str = "", margin: float = 0.15) -> Part:
        """A dashed frame around parts, with a text above its left corner. It is a part itself."""
        left, right = (f(p.x + sign * (p.width / 2 + margin) for p in parts) for f, sign in ((min, -1), (max, 1)))
        low, top = (f(p.y + sign * (p.height / 2 + margin) for p in parts) for f, sign in ((min, -1), (max, 1)))
        frame = plt.Rectangle((left, low), right - left, top - low, fill=False, ec=DARK, clip_on=False)
        frame.set(linestyle=(0, (4, 3)), zorder=0)
        self._ax.add_patch(frame)
        self.note(text, (left, top + 0.03), size=9, ha="left", va="bottom")
        return Part((left + right) / 2, (low + top) / 2, right - left, top - low)

    def note(self, text: str, at: tuple[float, float], **style):
        """Text with its middle at a point, or as `ha` and `va` say."""
        style = {"ha": "center", "va": "center", "size": 10, "zorder": 3} | style
        return self._ax.text(*at, text, **style)

    def _part(self, width: float, height: float, at=(0.0, 0.0), gap: float = 0.35, shift: float = 0, **beside) -> Part:
        sides = {"right": (1, 0), "left": (-1, 0), "above": (0, 1), "below": (0, -1)}
        if len(beside) > 1 or not set(beside) <= set(sides):
            raise ValueError(f"a part lies `at` a point or beside one other ({', '.join(sides)}), got {list(beside)}")
        for side, other in beside.items():
            across, up = sides[side]
            at = (other.x + across * ((other.width + width) / 2 + gap) + abs(up) * shift,
                  other.y + up * ((other.height + height) / 2 + gap) + abs(across) * shift)  # fmt: skip
        return Part(*at, width, height)


def cells(groups, labels: Iterable[str] | None = None, side: float = 0.32):
    """A row or grid of tokens or patches colored by group, as `Diagram.cells` draws it alone; returns the figure."""
    diagram = Diagram()
    diagram.cells(groups, labels=labels, side=side)
    return diagram.figure


def mask(kinds, ax=None, *, names: Sequence[str] = (), rows: Sequence[str] = (), columns: Sequence[str] = (),
         title: str = ""):  # fmt: skip
    """Which key each query sees: (n, m), bool or kinds 0 (unseen), 1, 2, ... called by `names`. Returns the axes.

    mask(causal)                                              # one kind
    mask(near + 2 * first, names=["window", "global"])        # each kind has a color, and the first letter of its name
    """
    kinds = _array(kinds).astype(int)
    if kinds.ndim != 2 or kinds.min() < 0 or (names and kinds.max() > len(names)):
        raise ValueError(f"a mask is (queries, keys) with kinds 0 to {len(names) or 'any'}, got {kinds.shape}, "
                         f"{kinds.min()} to {kinds.max()}")  # fmt: skip
    with _axes(ax, width=3.6 + 1.2 * bool(names), height=3.4) as ax:
        colors = matplotlib.colors.ListedColormap([(1, 1, 1), *map(tint, range(max(1, kinds.max())))])
        edges = {"edgecolors": DARK, "linewidth": 0.5, "clip_on": False} if max(kinds.shape) <= 32 else {}
        m, n = kinds.shape[::-1]
        ax.pcolormesh(np.arange(m + 1) - 0.5, np.arange(n + 1) - 0.5, kinds, cmap=colors, vmin=-0.5,
                      vmax=colors.N - 0.5, **edges)  # fmt: skip
        for kind, name in enumerate(names, 1):
            ax.scatter([], [], marker="s", s=80, fc=tint(kind - 1), ec=DARK, label=f"{name[0]}: {name}")
            for i, j in np.argwhere(kinds == kind) if max(kinds.shape) <= 24 else ():
                ax.text(j, i, name[0], ha="center", va="center", fontsize=7)
        if names:
            ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.2)
        _token_labels(ax, rows, columns, kinds.shape, title)
        ax.spines[:].set_visible(True)
        ax.set(xlim=(-0.5, m - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
    return ax


def _visible(token: str) -> str:
    return {"\n": "\\n", " ": "\u2423", "$": "\\$"}.get(token, token)

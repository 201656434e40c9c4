"""Figures in one style: readable at 80 dpi, safe for color-blind readers, and never shown without a description."""

from __future__ import annotations

import base64
import io
from collections import defaultdict

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

# Okabe and Ito's hues, darkened until each has a contrast of 3 to 1 on white; color blindness does not merge any two.
COLORS = ("#0072B2", "#D07F00", "#009E73", "#A83200", "#CC79A7", "#4A9BD4", "#000000", "#5F5F5F")
MARKERS = "osD^vPX*"
STYLE = {
    "figure.dpi": 80,
    "savefig.dpi": 80,
    "figure.facecolor": "white",
    "figure.edgecolor": "#B0B0B0",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "image.cmap": "viridis",
    "lines.linewidth": 1.8,
}


def figure(rows: int = 1, columns: int = 1, *, width: float = 6.0, height: float = 3.4, **options):
    """A figure in the house style and its axes (one, or an array). Sizes in inches; options as for `plt.subplots`."""
    with matplotlib.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
        fig.patch.set_linewidth(2)  # half of it lies inside: a thin frame, for pages that are dark
        return fig, axes


def tell_apart(fig) -> None:
    """Lines and points that differ in color alone within one axes get a marker each, in their legend too."""
    for ax in fig.axes:
        legends = [legend for legend in (ax.get_legend(), *fig.legends) if legend is not None]
        keys = [handle for legend in legends for handle in legend.legend_handles]
        drawn = [*(line for line in ax.lines if len(line.get_xdata()) > 2), *ax.collections]
        looks: dict = defaultdict(dict)
        for thing in (t for t in drawn if _look(t)):
            look, color = _look(thing)
            looks[look].setdefault(color, MARKERS[len(looks[look]) % len(MARKERS)])
        for thing in [t for t in (*drawn, *keys) if _look(t)]:
            look, color = _look(thing)
            marker = looks[look].get(color, "o")
            if marker == "o" or len(looks[look]) > len(MARKERS):  # the first stays as it is; so does a colored family
                continue
            if isinstance(thing, PathCollection):
                style = matplotlib.markers.MarkerStyle(marker)
                thing.set_paths([style.get_path().transformed(style.get_transform())])
            else:
                thing.set(marker=marker, markersize=5)
                if thing in drawn and thing.get_linestyle() != "None":
                    thing.set_markevery(0.15)  # of the diagonal, however many points there are


def _look(thing) -> tuple | None:
    """What tells a line or a cloud of points apart without its color, and its color; None for what is not of one."""
    if isinstance(thing, PathCollection):
        colors = thing.get_facecolor()
        return (("points", thing.get_paths()[0].vertices.tobytes()), to_hex(colors[0])) if len(colors) == 1 else None
    if isinstance(thing, matplotlib.lines.Line2D) and thing.get_alpha() in (None, 1):
        return (thing.get_linestyle(), str(thing.get_marker())), to_hex(thing.get_color())
    return None


def png(fig, colors: int = 256) -> bytes:
    """The figure as a small PNG: at 80 dpi, with at most 256 colors; `colors=0` is larger and quicker."""
    from PIL import Image

    tell_apart(fig)
    with matplotlib.rc_context(STYLE):
        raw = io.BytesIO()
        fig.savefig(raw, format="png", dpi=80, metadata={"Software": None})
    if not colors:
        return raw.getvalue()
    image = Image.open(raw).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def contents(fig) -> str:
    """What a figure consists of, for its alt text: kinds of marks, titles, axes and legends of up to four axes."""
    kinds = {"lines": "Lines", "images": "Image", "containers": "Bars", "collections": "Points or areas"}
    parts = []
    for ax in fig.axes:
        marks = [name for attribute, name in kinds.items() if getattr(ax, attribute)]
        if not marks and ax.texts:
            marks = ["Diagram of " + ", ".join(t.get_text().replace("\n", " ") for t in ax.texts[:24] if t.get_text())]
        axes = [f"{ax.get_ylabel()} against {ax.get_xlabel()}"] * bool(ax.get_xlabel() and ax.get_ylabel())
        legend = ax.get_legend()
        named = [", ".join(text.get_text() for text in legend.get_texts())] if legend else []
        if marks:
            parts.append(": ".join([" and ".join(marks), *filter(None, [ax.get_title(), *axes, *named])]))
    more = f" And {len(parts) - 4} more like these." if len(parts) > 4 else ""
    said = ("Picture. " + ". ".join(parts[:4] or ["It is described below"]) + "." + more).replace("\n", " ")
    return said if len(said.split()) > 3 else f"{said} The caption below says what they show."


def bundle(fig, alt: str, colors: int = 256) -> tuple[dict, dict]:
    """What Jupyter displays for a figure, and its metadata: the PNG, with what it consists of as its alt text.

    The words of `alt` stand below the picture, where all can read them, and so are not said twice.
    """
    if not hasattr(fig, "savefig"):
        raise ValueError(f"show a figure, not {type(fig).__name__}; of axes pass ax.figure")
    if not isinstance(alt, str) or len(alt.split()) < 3:
        raise ValueError(f"alt must describe in words what the picture shows, got {alt!r}")
    data = {"image/png": base64.b64encode(png(fig, colors)).decode(), "text/plain": f"Figure: {alt}"}
    return data, {"image/png": {"alt": contents(fig)}}


def caption(alt: str) -> dict:
    return {"text/markdown": f"*{alt}*", "text/plain": alt}


def show(fig, *, alt: str) -> None:
    """Display a figure with its description as a caption below, then close it.

    Raises ValueError when `alt` says nothing. Outside Jupyter the figure is only closed.
    """
    place(fig, alt)


def place(fig, alt: str, handles=None):
    """Like `show`, and returns handles; given those of an earlier call, replaces that picture and caption in place."""
    data, metadata = bundle(fig, alt, colors=256 if handles is None else 0)
    plt.close(fig)
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        return None
    if handles is None:
        picture = display(data, metadata=metadata, raw=True, display_id=True)
        return picture, display(caption(alt), raw=True, display_id=True)
    picture, words = handles
    picture.update(data, metadata=metadata, raw=True)
    words.update(caption(alt), raw=True)
    return handles

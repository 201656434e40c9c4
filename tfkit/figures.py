"""Figures in one style: readable at 80 dpi, safe for color-blind readers, and never shown without a description."""

from __future__ import annotations

import base64
import io

import matplotlib
import matplotlib.pyplot as plt

# Okabe and Ito's palette: black text stays readable beside it and common color blindness does not merge any two.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
STYLE = {
    "figure.dpi": 80,
    "savefig.dpi": 80,
    "figure.facecolor": "white",
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
        return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def png(fig) -> bytes:
    """The figure as a small PNG: at 80 dpi, with at most 256 colors."""
    from PIL import Image

    with matplotlib.rc_context(STYLE):
        raw = io.BytesIO()
        fig.savefig(raw, format="png", dpi=80, metadata={"Software": None})
    image = Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def bundle(fig, alt: str) -> tuple[dict, dict]:
    """What Jupyter displays for a figure, and its metadata: the PNG with `alt` as its description."""
    if not isinstance(alt, str) or len(alt.split()) < 3:
        raise ValueError(f"alt must describe in words what the picture shows, got {alt!r}")
    data = {"image/png": base64.b64encode(png(fig)).decode(), "text/plain": f"Figure: {alt}"}
    return data, {"image/png": {"alt": alt}}


def caption(alt: str) -> dict:
    return {"text/markdown": f"*{alt}*", "text/plain": alt}


def show(fig, *, alt: str) -> None:
    """Display a figure with its description as alt text and as a caption below, then close it.

    Raises ValueError when `alt` says nothing. Outside Jupyter the figure is only closed.
    """
    place(fig, alt)


def place(fig, alt: str, handles=None):
    """Like `show`, and returns handles; given those of an earlier call, replaces that picture and caption in place."""
    data, metadata = bundle(fig, alt)
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

"""Pictures: described, small, in the house style, and closed after they were shown."""

import base64
import io

import IPython
import IPython.display
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from tfkit import plots as P

ALT = "a rising straight line"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def line():
    fig, ax = P.figure()
    ax.plot([0, 1], [0, 1])
    return fig


@pytest.fixture
def notebook(monkeypatch):
    """Stands in for Jupyter: records what is displayed and what is updated in place."""

    class Handle:
        def __init__(self):
            self.updates = []

        def update(self, data, **options):
            self.updates.append((data, options))

    shown = []

    def display(data, **options):
        shown.append((data, options))
        return Handle()

    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", display)
    return shown


@pytest.mark.parametrize("alt", ["", "plot", "a plot", None, 3])
def test_a_description_is_demanded(alt):
    with pytest.raises(ValueError, match="alt must describe"):
        P.show(line(), alt=alt)
    with pytest.raises(TypeError):
        P.show(line())


def test_axes_are_no_figure():
    with pytest.raises(ValueError, match="show a figure, not Axes; of axes pass ax.figure"):
        P.show(line().axes[0], alt=ALT)


def contrast(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)]
    return 1.05 / (np.dot(linear, (0.2126, 0.7152, 0.0722)) + 0.05)


def test_every_color_is_seen_on_white():
    assert all(contrast(color) >= 3 for color in P.COLORS) and contrast("#E69F00") < 2.3


def test_color_blindness_merges_no_two_colors():
    """Distances in CIELAB under the three kinds of color blindness, simulated as Machado and others do (2009)."""
    kinds = [np.eye(3),
             [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
             [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
             [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
             ]  # fmt: skip

    def seen(color, kind):
        linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                           for c in matplotlib.colors.to_rgb(color)])  # fmt: skip
        linear = np.clip(kind @ linear, 0, 1)
        white = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        x, y, z = np.cbrt(white @ linear / white.sum(1))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for kind in kinds:
        places = [seen(color, np.array(kind)) for color in P.COLORS]
        assert min(np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]) > 10


def test_lines_and_points_are_told_apart_without_color():
    fig, (left, right) = P.figure(1, 2)
    x = np.linspace(0, 1, 50)
    for i in range(3):
        left.plot(x, x**i, label=str(i))
        right.scatter(x, x**i, label=str(i))
    left.plot(x, 1 - x, "--", color=P.COLORS[1])
    left.plot(x, 1 - x, alpha=0.3)
    left.axhline(0.5, color="red")
    right.plot(x, x, "o", color="black"), right.plot(x, 2 * x, "o", color="gray")
    left.legend(), right.legend()
    P.tell_apart(fig)
    assert [line.get_marker() for line in left.lines] == ["None", "s", "D", "None", "None", "None"]
    assert [line.get_markevery() for line in left.lines][:3] == [None, 0.15, 0.15]
    assert [line.get_marker() for line in left.get_legend().legend_handles] == ["None", "s", "D"]
    assert [line.get_marker() for line in right.lines] == ["o", "s"] and right.lines[1].get_markevery() is None
    shapes = [c.get_paths()[0].vertices.tobytes() for c in right.collections]
    keys = [h.get_paths()[0].vertices.tobytes() for h in right.get_legend().legend_handles]
    assert len(set(shapes)) == 3 and keys == shapes
    P.tell_apart(fig)
    assert [line.get_marker() for line in left.lines][:4] == ["None", "s", "D", "None"]
    assert [c.get_paths()[0].vertices.tobytes() for c in right.collections] == shapes
    fig, ax = P.figure()
    for i in range(20):  # a family colored by a scale stays a family
        ax.plot(x, i * x, color=matplotlib.colormaps["viridis"](i / 20))
    P.tell_apart(fig)
    assert {line.get_marker() for line in ax.lines} == {"None"}


def test_alt_text_says_what_a_figure_consists_of():
    fig, axes = P.figure(2, 3)
    axes[0, 0].plot([0, 1], label="a line"), axes[0, 0].legend()
    axes[0, 0].set(xlabel="step", ylabel="loss (nats)", title="training")
    axes[0, 1].imshow([[1, 2]])
    axes[0, 2].bar([1, 2], [3, 4])
    axes[1, 0].scatter([1], [2])
    axes[1, 1].plot([1]), axes[1, 2].plot([2])
    assert P.contents(fig) == ("Picture. Lines: training: loss (nats) against step: a line. Image. Bars. "
                               "Points or areas. And 2 more like these.")  # fmt: skip
    d = P.Diagram()
    d.box("two\nlines", right=d.box("norm"))
    assert P.contents(d.figure) == "Picture. Diagram of norm, two lines."
    assert P.contents(P.figure()[0]) == "Picture. It is described below."


def test_outside_jupyter_the_figure_is_only_closed(capsys):
    fig = line()
    assert P.show(fig, alt=ALT) is None
    assert not plt.fignum_exists(fig.number) and capsys.readouterr().out == ""


def test_a_picture_is_small_and_has_a_palette():
    def noise():
        fig, ax = P.figure(width=6, height=3.4)
        ax.imshow(np.random.default_rng(0).random((40, 40)))
        return P.png(fig)

    data = noise()
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG" and image.mode == "P" and len(image.getcolors(256)) <= 256
    assert image.size == (480, 272)  # inches times 80 dpi
    assert len(data) < 40_000 and data == noise()
    assert image.convert("RGB").getpixel((3, 3)) == (255, 255, 255)
    frame = [image.convert("L").getpixel(corner) for corner in ((0, 0), (479, 0), (0, 271), (479, 271))]
    assert all(140 < gray < 230 for gray in frame)  # seen on a white page and on a dark one
    assert P.png(line(), colors=0) != P.png(line()) and len(P.png(line(), colors=0)) > len(P.png(line()))
    assert len(P.png(line())) < 10_000


def test_in_jupyter_picture_and_caption_carry_the_description(notebook):
    fig = line()
    handles = P.place(fig, ALT)
    assert not plt.fignum_exists(fig.number) and len(handles) == 2
    (picture, options), (words, _) = notebook
    assert base64.b64decode(picture["image/png"]).startswith(b"\x89PNG")
    assert picture["text/plain"] == f"Figure: {ALT}"
    said = "Picture. Lines. The caption below says what they show."
    assert options["metadata"] == {"image/png": {"alt": said}}
    assert words["text/markdown"] == f"*{ALT}*" and words["text/plain"] == ALT
    assert all(o["raw"] for _, o in notebook)

    again = "a falling straight line"
    assert P.place(line(), again, handles) is handles and len(notebook) == 2
    (data, options), (words, _) = handles[0].updates[0], handles[1].updates[0]
    assert options["metadata"]["image/png"]["alt"] == said and again in words["text/markdown"]
    assert "image/png" in data
    assert P.show(line(), alt=ALT) is None and len(notebook) == 4  # nothing that a cell's last line would print


def test_figures_have_the_house_style_and_leave_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    fig, axes = P.figure(2, 3, width=7, height=4, sharex=True)
    assert axes.shape == (2, 3) and tuple(fig.get_size_inches()) == (7, 4)
    assert not axes[0, 0].spines["top"].get_visible() and fig.get_facecolor() == (1, 1, 1, 1)
    assert axes[0, 0].plot([0, 1])[0].get_color() == P.COLORS[0]
    assert dict(matplotlib.rcParams) == before


def test_attention_map():
    weights = torch.rand(3, 4, requires_grad=True)
    ax = P.attention_map(weights, ["the", " ", "\n"], list("ab$d"), title="head 1")
    image = ax.images[0]
    assert np.allclose(image.get_array(), weights.detach())
    assert image.get_clim() == (0, pytest.approx(weights.max().item()))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["the", "\u2423", "\\n"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "\\$", "d"]
    assert "key" in ax.get_xlabel() and "query" in ax.get_ylabel() and ax.get_title() == "head 1"
    assert not any(spine.get_visible() for spine in ax.spines.values())
    assert P.attention_map(weights, ax=ax, limit=2).images[-1].get_clim() == (0, 2)
    assert P.attention_map(torch.zeros(2, 2)).images[0].get_clim() == (0, 1)
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    "rows, columns, said", [("ab", "abcd", "rows: 2 labels for 3"), ("abc", "a", "columns: 1 labels for 4")]
)
def test_attention_map_counts_its_labels(rows, columns, said):
    with pytest.raises(ValueError, match=said):
        P.attention_map(torch.rand(3, 4), rows, columns)


def test_attention_map_takes_one_map():
    with pytest.raises(ValueError, match=r"two dimensions.*\(2, 3, 4\)"):
        P.attention_map(torch.rand(2, 3, 4))


def test_heads_share_one_scale():
    weights = torch.rand(5, 3, 3)
    fig = P.heads(weights, "abc", columns=3)
    axes = fig.axes
    assert len(axes) == 6 and [a.get_title() for a in axes[:5]] == [f"head {i}" for i in range(5)]
    assert {a.images[0].get_clim() for a in axes[:5]} == {(0, float(weights.double().max()))}
    assert not axes[5].axison and [bool(a.get_ylabel()) for a in axes[:5]] == [True, False, False, True, False]
    assert P.heads(weights[:1], titles=["only"]).axes[0].get_title() == "only"


def test_matrix_writes_every_number():
    ax = P.matrix(torch.tensor([[1.0, -2.0], [float("-inf"), 0.125]]), rows="ab", columns="cd", title="m")
    assert [t.get_text() for t in ax.texts] == ["1.00", "-2.00", "-\u221e", "0.12"]
    assert ax.images[0].get_clim() == (-2, 2) and ax.get_title() == "m"
    assert [t.get_text() for t in P.matrix([1, 2, 3], digits=0).texts] == ["1", "2", "3"]
    assert len(P.matrix(torch.tensor([[float("nan"), 1]])).texts) == 2
    with pytest.raises(ValueError, match=r"\(15, 20\) has 300"):
        P.matrix(torch.zeros(15, 20))


def test_curve():
    ax = P.curve(range(5), torch.arange(5.0), label="plain", xlabel="step", ylabel="loss")
    assert len(ax.lines) == 1 and ax.get_xlabel() == "step" and ax.get_ylabel() == "loss"
    y = [1.0, 0.0] * 20
    smooth = P.curve(range(40), y, ax=ax, label="smooth", smooth=0.9)
    assert smooth is ax and len(ax.lines) == 3
    average, raw = ax.lines[1].get_ydata(), ax.lines[2].get_ydata()
    assert list(raw) == y and np.ptp(average) < 0.2 and abs(average.mean() - 0.5) < 0.1
    assert ax.lines[1].get_color() == ax.lines[2].get_color()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["plain", "smooth"]


def test_cost_labels_each_line_with_its_exponent():
    sizes = [64, 128, 256]
    values = {f"m{i}": [n**i for n in sizes] for i in range(1, 12)}
    ax = P.cost(sizes, values, ylabel="bytes")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [f"m{i}: size^{i:.2f}" for i in range(1, 12)]
    assert ax.get_xscale() == ax.get_yscale() == "log" and ax.get_ylabel() == "bytes"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["64", "128", "256"]


@pytest.mark.parametrize("channels", [1, 3])
def test_images(channels):
    batch = torch.rand(10, channels, 6, 5)
    fig = P.images(batch, titles=[str(i) for i in range(10)], columns=4)
    assert len(fig.axes) == 12 and sum(bool(a.images) for a in fig.axes) == 10
    assert fig.axes[3].get_title() == "3"
    assert fig.axes[0].images[0].get_array().shape == ((6, 5) if channels == 1 else (6, 5, 3))


def test_heads_label_queries_and_keys():
    weights = torch.rand(2, 2, 3)
    ax = P.heads(weights, "ab", keys="xyz").axes[1]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["x", "y", "z"]
    assert P.heads(weights).axes[0].images[0].get_array().shape == (2, 3)
    with pytest.raises(ValueError, match="2 queries see 3 keys.*keys=keys"):
        P.heads(weights, "ab")
    with pytest.raises(ValueError, match=r"\(heads, queries, keys\), got \(2, 3\)"):
        P.heads(weights[0], "ab")


def near(part, x, y, width=None, height=None):
    assert (part.x, part.y) == pytest.approx((x, y))
    assert width is None or (part.width, part.height) == pytest.approx((width, height))


def test_parts_lie_beside_each_other():
    d = P.Diagram()
    a = d.box("a part", size=(1.0, 0.4))
    near(a, 0, 0, 1.0, 0.4)
    near(d.box("b", right=a, gap=0.5, shift=0.25, size=(2, 1)), 2.0, 0.25)
    near(d.box("c", left=a, gap=0.5, shift=0.25, size=(2, 1)), -2.0, 0.25)
    near(d.box("d", above=a, gap=0.5, shift=0.25, size=(2, 1)), 0.25, 1.2)
    near(d.box("e", below=a, gap=0.5, shift=0.25, size=(2, 1)), 0.25, -1.2)
    near(d.box("f", at=(3, 4), size=(2, 1)), 3, 4)
    near(d.box("g", right=a, size=(1, 1)), 1.35, 0)
    near(d.cells([0, 0, 1], above=a, side=0.5), 0, 0.8, 1.5, 0.5)
    near(d.frame([a, P.Part(3, 4, 2, 1)], "both", margin=0.5), 1.75, 2.15, 5.5, 5.7)
    with pytest.raises(ValueError, match="beside.*right, left, above, below.*'over'"):
        d.box("g", over=a)
    with pytest.raises(ValueError, match=r"\['right', 'above'\]"):
        d.box("g", right=a, above=a)


def test_boxes_fit_their_text_and_signs_are_round():
    d = P.Diagram()
    short, long, tall = d.box("mix"), d.box("a much longer label than that"), d.box("two\nlines")
    assert short.width == 0.8 < long.width and short.height < tall.height
    assert (d.box("+").width, d.box("+").height) == (0.3, 0.3)
    renderer = d.figure.canvas.get_renderer()
    box, words = d._ax.patches[1].get_window_extent(renderer), d._ax.texts[1].get_window_extent(renderer)
    assert box.x0 < words.x0 and words.x1 < box.x1 and box.y0 < words.y0 and words.y1 < box.y1
    before = len(d._ax.patches)
    d.box("heads", copies=3, color=2)
    drawn = d._ax.patches[before:]
    assert len(drawn) == 3 and {p.get_facecolor()[:3] for p in drawn} == {P.tint(2)}
    assert drawn[-1].get_x() == pytest.approx(-0.4) and drawn[0].get_x() == pytest.approx(-0.28)


def test_roads_join_edges():
    a, right, above = P.Part(0, 0, 2, 1), P.Part(5, 0.5, 2, 1), P.Part(0.5, 5, 2, 1)
    assert a.road(right, 0, 0) == [(1, 0), (4, 0.5)] and right.road(a, 0, 0) == [(4, 0.5), (1, 0)]
    assert a.road(above, 0, 0) == [(0, 0.5), (0.5, 4.5)] and above.road(a, 0, 0) == [(0.5, 4.5), (0, 0.5)]
    assert a.road(right, 1, 0) == [(0, 0.5), (0, 2), (5, 2), (5, 1)]
    assert a.road(right, -1, 0) == [(0, -0.5), (0, -1.5), (5, -1.5), (5, 0)]
    assert a.road(above, 0, 1) == [(1, 0), (2.5, 0), (2.5, 5), (1.5, 5)]
    assert a.road(above, 0, -1) == [(-1, 0), (-2, 0), (-2, 5), (-0.5, 5)]


def test_arrows_name_the_stretch_before_the_text():
    d = P.Diagram()
    a = d.box("a")
    b = d.box("b", right=a, gap=1)
    c = d.box("c", above=b, gap=1)
    before, texts = len(d._ax.patches), len(d._ax.texts)
    d.arrow(a, b, "flat", c, "steep", dashed=True)
    arrows, (flat, steep) = d._ax.patches[before:], d._ax.texts[texts:]
    assert [p.get_linestyle() for p in arrows] == ["--", "--"]
    assert flat.get_text() == "flat" and steep.get_text() == "steep"
    assert flat.get_position() == pytest.approx(((a.x + b.x) / 2, 0.03)) and flat.get_va() == "bottom"
    assert steep.get_position() == pytest.approx((b.x + 0.07, (b.y + c.y) / 2)) and steep.get_ha() == "left"
    d.arrow(a, c, "aslant")
    assert d._ax.texts[-1].get_bbox_patch() is not None and flat.get_bbox_patch() is None
    d.arrow(a, c, "around", over=0.5)  # the longest stretch of the road carries the text
    assert d._ax.texts[-1].get_position()[0] == pytest.approx(0.07)
    for wrong in ((a,), (a, "text"), ("text", a)):
        with pytest.raises(ValueError, match="leads from a part to a part"):
            d.arrow(*wrong)


def test_a_diagram_is_cut_to_what_it_shows():
    d = P.Diagram()
    a = d.box("far", at=(40, 30), size=(1, 0.5))
    assert tuple(d.figure.get_size_inches()) == pytest.approx((1.2, 0.7), abs=0.05)
    d.box("right", right=a, gap=2, size=(1, 0.5))
    d.arrow(a, d.box("far below", below=a, gap=5), "(b, n, d)", beside=-2)
    width, height = d.figure.get_size_inches()
    assert 6 < width < 6.4 and 5.8 < height < 6.4
    image = Image.open(io.BytesIO(P.png(d.figure))).convert("L")
    assert image.size == pytest.approx((width * 80, height * 80), abs=1)
    edge = np.array(image)[2:-2, 2:-2]  # within the frame
    assert edge[0].min() == edge[-1].min() == edge[:, 0].min() == edge[:, -1].min() == 255  # nothing is cut


def test_cells_show_groups_without_color_too():
    d = P.Diagram()
    d.cells([[0, 1], [-1, 9]])
    assert [t.get_text() for t in d._ax.texts] == ["0", "1", "", "9"]
    assert [p.get_facecolor()[:3] for p in d._ax.patches] == [P.tint(0), P.tint(1), (1, 1, 1), P.tint(9)]
    assert [p.get_xy() for p in d._ax.patches] == [(-0.32, 0), (0, 0), (-0.32, -0.32), (0, -0.32)]
    assert P.tint(8) == P.tint(0) != P.tint(1) and P.tint(None) == (1, 1, 1)
    assert [t.get_text() for t in P.cells([0, 0, 1], labels="a b").axes[0].texts] == ["a", "\u2423", "b"]
    with pytest.raises(ValueError, match=r"2 labels for 3 cells of shape \(1, 3\)"):
        P.cells([0, 0, 1], labels="ab")


def test_tints_carry_black_text():
    for group in range(8):
        assert 21 / contrast(P.tint(group)) > 4.5  # WCAG's contrast for text


def test_mask_shows_kinds_by_color_and_letter():
    allowed = torch.ones(3, 4, dtype=torch.bool).tril()
    ax = P.mask(allowed, title="causal", rows="abc", columns="wxyz")
    (mesh,) = ax.collections
    assert np.array_equal(mesh.get_array().reshape(3, 4), allowed) and not ax.texts and ax.get_legend() is None
    assert ax.get_xlim() == (-0.5, 3.5) and ax.get_ylim() == (2.5, -0.5) and ax.get_title() == "causal"
    assert mesh.to_rgba([0.0, 1.0])[:, :3].tolist() == [[1, 1, 1], pytest.approx(list(P.tint(0)))]
    ax = P.mask([[1, 2], [0, 2]], names=["window", "global"])
    assert [(t.get_text(), *t.get_position()) for t in ax.texts] == [("w", 0, 0), ("g", 1, 0), ("g", 1, 1)]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["w: window", "g: global"]
    assert len(P.mask(np.ones((40, 40)), names=["all"]).texts) == 0  # too small to be read
    for wrong in ([1, 0], [[0, 3]], [[-1, 0]]):
        with pytest.raises(ValueError, match="kinds 0 to 2"):
            P.mask(wrong, names=["window", "global"])
    with pytest.raises(ValueError, match="columns: 2 labels for 4"):
        P.mask(allowed, columns="ab")


def test_the_example_of_a_diagram_runs():
    lines = P.Diagram.__doc__.split("under black text.\n")[1].strip("\n").splitlines()
    scope = {"Diagram": P.Diagram, "show": P.show}
    exec("\n".join(line[8:] for line in lines), scope)
    assert len(scope["d"]._ax.patches) == 3 + 3 + 4 + 1  # boxes, with two copies more of one; arrows; the frame

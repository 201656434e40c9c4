"""Live controls: checked before anything is drawn, a picture alone when static, redrawn in place when moved."""

import base64
import functools
import io
import json
import pathlib
import sys

import IPython
import IPython.display
import ipywidgets
import matplotlib.pyplot as plt
import pytest
from PIL import Image

from tfkit import plots, widgets

plt.close(plt.figure())  # sets up matplotlib's backend before a test replaces IPython's shell


def wave(frequency=2, height=1.0, kind="sine", grid=False):
    fig, _ = plots.figure()
    if frequency == 13:
        raise ArithmeticError("thirteen waves")
    return fig, f"{kind} wave of frequency {frequency}, height {height:g}, grid {grid}"


CONTROLS = {"frequency": (1, 20), "height": (0.5, 2.0), "kind": ["sine", "square"], "grid": False}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


class Handle:
    def __init__(self, data):
        self.data = data

    def update(self, data, **options):
        self.data = data


@pytest.fixture
def notebook(monkeypatch):
    """Stands in for Jupyter; a list of displayed widgets and of handles that hold what each output shows now."""
    shown = []

    def display(thing, **options):
        shown.append(Handle(thing) if isinstance(thing, dict) else thing)
        return shown[-1]

    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", display)
    return shown


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("TFKIT_STATIC", "0")


@pytest.mark.parametrize("controls, said", [
    ({"speed": (1, 2)}, "wave has no argument 'speed'.*frequency, height, kind, grid"),
    ({"frequency": (3, 9)}, r"frequency: the default 2 is outside \(3, 9\)"),
    ({"frequency": (9, 1)}, r"\(low, high\).*\(9, 1\)"), ({"frequency": (1,)}, r"\(low, high\).*\(1,\)"),
    ({"frequency": (1, 2, 3, 4)}, "low, high"), ({"kind": ["saw", "square"]}, "kind: the default 'sine' is outside"),
    ({"kind": True}, "kind: the default 'sine'"), ({"grid": [1.5]}, "grid: the default False"),
])  # fmt: skip
def test_controls_are_checked_before_drawing(controls, said, monkeypatch):
    drawn = []
    monkeypatch.setattr(widgets, "place", lambda *a, **k: drawn.append(a))
    with pytest.raises(ValueError, match=said):
        widgets.explore(wave, **controls)
    assert not drawn and not plt.get_fignums()


def test_an_argument_without_default_cannot_be_explored():
    with pytest.raises(ValueError, match="no argument 'x' with a default"):
        widgets.explore(lambda x: None, x=(1, 2))
    with pytest.raises(ValueError, match="no argument 'speed'"):
        widgets.explore(functools.partial(wave, kind="square"), speed=(1, 2))


def test_static_draws_only_the_picture(notebook, monkeypatch):
    monkeypatch.setenv("TFKIT_STATIC", "1")
    assert widgets.explore(wave, **CONTROLS) is None
    picture, words = notebook
    assert picture.data["text/plain"] == "Figure: sine wave of frequency 2, height 1, grid False"
    assert words.data["text/plain"] in picture.data["text/plain"]
    assert not plt.get_fignums()


def test_live_controls_match_their_specification(notebook, live):
    widgets.explore(wave, **CONTROLS)
    box, picture, _ = notebook
    frequency, height, kind, grid, message = box.children
    assert type(frequency) is ipywidgets.IntSlider and (frequency.min, frequency.max, frequency.step) == (1, 20, 1)
    assert type(height) is ipywidgets.FloatSlider and height.step == pytest.approx(0.015) and height.value == 1
    assert type(kind) is ipywidgets.Dropdown and kind.options == ("sine", "square")
    assert type(grid) is ipywidgets.Checkbox and grid.value is False
    assert frequency.value == 2 and frequency.description == "frequency" and message.value == ""
    assert "frequency 2" in picture.data["text/plain"]


def test_moving_a_control_redraws_in_place(notebook, live):
    widgets.explore(wave, **CONTROLS)
    box, picture, words = notebook
    frequency, height, kind, grid, message = box.children
    first = picture.data["image/png"]
    frequency.value = 5
    assert "frequency 5" in picture.data["text/plain"] and "frequency 5" in words.data["text/markdown"]
    height.value, kind.value, grid.value = 1.5, "square", True
    assert words.data["text/plain"] == "square wave of frequency 5, height 1.5, grid True"
    assert len(notebook) == 3 and not plt.get_fignums()
    size = lambda data: Image.open(io.BytesIO(base64.b64decode(data))).size
    assert size(picture.data["image/png"]) == size(first) == (480, 272)


def test_an_error_while_redrawing_is_told_and_the_picture_stays(notebook, live):
    widgets.explore(wave, **CONTROLS)
    box, picture, _ = notebook
    frequency, *_, message = box.children
    frequency.value = 13
    assert message.value == "ArithmeticError: thirteen waves" and "frequency 2" in picture.data["text/plain"]
    frequency.value = 14
    assert message.value == "" and "frequency 14" in picture.data["text/plain"]


@pytest.mark.parametrize("fault", ["raises", "a number", "three", "two figures"])
def test_no_figure_is_left_behind(fault, notebook, live, monkeypatch):
    def fn(size=2):
        fig, _ = plots.figure()
        if size == 5 or fault == "two figures":
            plots.figure()
        if size == 5 and fault == "raises":
            raise ArithmeticError("five")
        if size == 5 and fault != "two figures":
            return {"a number": 3, "three": (fig, "words", 3)}[fault]
        return fig, f"a picture of size {size}"

    other = plt.figure()
    widgets.explore(fn, size=(1, 9))
    assert plt.get_fignums() == [other.number]
    size, message = notebook[0].children
    size.value = 5
    assert plt.get_fignums() == [other.number] and bool(message.value) is (fault != "two figures")
    size.value = 6
    assert plt.get_fignums() == [other.number] and message.value == ""
    monkeypatch.setenv("TFKIT_STATIC", "1")
    fn.__defaults__ = (5,)
    if fault != "two figures":
        with pytest.raises((ArithmeticError, TypeError)):
            widgets.explore(fn)
    assert plt.get_fignums() == [other.number]


@pytest.mark.parametrize("seconds, follows", [(0.0, True), (0.04, True), (0.06, False)])
def test_a_slow_drawing_waits_until_the_slider_is_let_go(seconds, follows, notebook, live, monkeypatch):
    clock = iter([10.0, 10.0 + seconds])
    monkeypatch.setattr(widgets.time, "process_time", lambda: next(clock))
    widgets.explore(wave, **CONTROLS)
    frequency, height, *_ = notebook[0].children
    assert frequency.continuous_update is height.continuous_update is follows


def test_jupyterlab_keeps_the_controls_with_the_notebook():
    """Reopened without its state, a control says "Error displaying widget"."""
    root = pathlib.Path(__file__).parents[2]
    settings = json.loads((root / ".ci/lab/overrides.json").read_text())
    assert settings["@jupyter-widgets/jupyterlab-manager:plugin"] == {"saveState": True}
    name = "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager/schemas/@jupyter-widgets/jupyterlab-manager"
    schema = pathlib.Path(sys.prefix, name, "plugin.json")
    if schema.exists():  # where JupyterLab is installed, it knows this setting
        assert json.loads(schema.read_text())["properties"]["saveState"]["type"] == "boolean"


def test_steps_and_names_with_underscores(notebook, live):
    def fn(window_size=4, rate=0.5, share=1):
        return plots.figure()[0], f"window of {window_size} at {rate}"

    widgets.explore(fn, window_size=(2, 10, 2), rate=(0, 1, 0.25), share=(0, 1.5))
    window, rate, share, _ = notebook[0].children
    assert window.step == 2 and window.description == "window size"
    assert rate.step == 0.25 and type(rate) is type(share) is ipywidgets.FloatSlider

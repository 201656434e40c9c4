"""Live controls that leave a picture behind: what a page, a printout and a test see is the default setting."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable

import matplotlib.pyplot as plt

from tfkit.figures import place
from tfkit.train import quiet

BUDGET = 0.1  # seconds of processor time in which a moved slider is to be answered


def explore(fn: Callable, **controls) -> None:
    """Draw `fn` with its defaults, and in a live notebook add a control for each named argument.

    fn        returns (figure, alt): a matplotlib figure and the words that describe it; every argument has a default
    controls  (low, high) or (low, high, step) for a slider, a list for a choice, True or False for a tick box

    Moving a control redraws the picture in place; where a drawing takes longer than `BUDGET`, once the slider is let
    go. With TFKIT_STATIC=1 only the picture is drawn. Raises ValueError for a control that `fn` does not take or a
    default outside its range. A function that raises leaves no figure behind.
    """
    defaults = {name: p.default for name, p in inspect.signature(fn).parameters.items()}
    for name, spec in controls.items():
        if name not in defaults or defaults[name] is inspect.Parameter.empty:
            called = getattr(fn, "__name__", "the function")
            raise ValueError(f"{called} has no argument {name!r} with a default; it has {', '.join(defaults)}")
        _check_default(name, spec, defaults[name])

    started = time.process_time()
    fig, alt = _drawn(fn)
    slow = time.process_time() - started > BUDGET / 2  # the other half goes into the PNG
    if quiet():
        place(fig, alt)
        return
    import ipywidgets as widgets
    from IPython.display import display

    made = {name: _control(name, spec, defaults[name]) for name, spec in controls.items()}
    for control in made.values():
        if slow and hasattr(control, "continuous_update"):
            control.continuous_update = False
    message = widgets.Label()
    display(widgets.VBox([*made.values(), message]))
    handles = place(fig, alt)

    def redraw(_change) -> None:
        try:
            fig, alt = _drawn(fn, **{name: control.value for name, control in made.items()})
        except Exception as error:  # a reader who edits `fn` sees why the picture stays
            message.value = f"{type(error).__name__}: {error}"
            return
        message.value = ""
        place(fig, alt, handles)

    for control in made.values():
        control.observe(redraw, names="value")


def _drawn(fn: Callable, **values) -> tuple:
    """What `fn` returns; no other figure of its making stays open."""
    before, result = {*plt.get_fignums()}, ()
    try:
        result = fn(**values)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], str):
            said = f"{type(result).__name__} {result!r:.80}"
            result = ()
            raise TypeError(f"the function must return (figure, description), got {said}")
        return result
    finally:
        for number in {*plt.get_fignums()} - before:
            if not result or plt.figure(number) is not result[0]:
                plt.close(number)


def _check_default(name: str, spec, default) -> None:
    if isinstance(spec, bool):
        ok = isinstance(default, bool)
    elif isinstance(spec, tuple):
        if len(spec) not in (2, 3) or not spec[0] < spec[1]:
            raise ValueError(f"{name}: a slider is (low, high) or (low, high, step), got {spec}")
        ok = spec[0] <= default <= spec[1]
    else:
        ok = default in list(spec)
    if not ok:
        raise ValueError(f"{name}: the default {default!r} is outside {spec}")


def _control(name: str, spec, default):
    import ipywidgets as widgets

    options = {"value": default, "description": name.replace("_", " "), "style": {"description_width": "9em"}}
    if isinstance(spec, bool):
        return widgets.Checkbox(**options)
    options["layout"] = widgets.Layout(width="32em")
    if not isinstance(spec, tuple):
        return widgets.Dropdown(options=list(spec), **options)
    whole = all(isinstance(v, int) for v in (*spec, default))
    slider = widgets.IntSlider if whole else widgets.FloatSlider
    step = spec[2] if len(spec) == 3 else 1 if whole else (spec[1] - spec[0]) / 100
    return slider(min=spec[0], max=spec[1], step=step, **options)

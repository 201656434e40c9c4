"""The models of the course. Every module here is written from the notebook of the same name; edit the notebook.

A module is loaded when it is first used: `tfkit.zoo.attention` needs no import of its own.
"""

import importlib
import pkgutil

__all__ = sorted(found.name for found in pkgutil.iter_modules(__path__))


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'tfkit.zoo' has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

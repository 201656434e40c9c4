"""tfkit: the helpers of a course on the Transformer family, and in `tfkit.zoo` the models its notebooks build.

Names are loaded when first used, so `import tfkit` costs next to nothing beyond `import torch`.
"""

import importlib

from tfkit._checkout import find_kernels

__version__ = "0.1.0"

# Public name -> the module that holds it. The modules themselves (tfkit.data, tfkit.contracts, ...) load the same way.
_HOMES = {
    "paper": "papers",
    "fit": "train",
    "set_seed": "train",
    "show": "plots",
    "explore": "widgets",
    "check": "exercises",
    "Case": "exercises",
}
_MODULES = (
    *("papers", "data", "train", "parallel", "measure", "contracts", "past", "pretrained", "layouts"),
    *("plots", "figures", "widgets", "exercises", "zoo", "kernels"),
)
__all__ = [*_HOMES, *_MODULES]

find_kernels()


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(f"tfkit.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"tfkit.{name}")
    else:
        raise AttributeError(f"module 'tfkit' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

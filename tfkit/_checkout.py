"""In the checkout the Triton kernels stand in a folder of their own; the installed package holds them as tfkit.kernels.

Hugging Face publishes a package called `kernels`, so ours may not install one of that name. What is imported as
`tfkit.kernels` works in both places, and where the checkout's folder can be imported as `kernels` too, both names are
the same modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "kernels"


class Kernels(MetaPathFinder, Loader):
    """Finds tfkit.kernels in the checkout."""

    def find_spec(self, name, path=None, target=None):
        if name != "tfkit.kernels" and not name.startswith("tfkit.kernels."):
            return None
        top = sys.modules.get("kernels") or importlib.util.find_spec("kernels")
        origin = getattr(top, "__file__", None) or getattr(top, "origin", None)
        if origin and Path(origin).resolve().parent == FOLDER:
            if found := importlib.util.find_spec(name.removeprefix("tfkit.")):
                return importlib.util.spec_from_loader(name, self, origin=found.origin)
        elif name == "tfkit.kernels":  # `kernels` is somebody else's here, or nobody's
            file = FOLDER / "__init__.py"
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(FOLDER)])
        return None

    def create_module(self, spec):
        module = importlib.import_module(spec.name.removeprefix("tfkit."))
        self.own = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self.own  # the import system has just put the alias's in its place

    def get_code(self, name):
        """For `python -m tfkit.kernels.bench`."""
        name = name.removeprefix("tfkit.")
        return importlib.util.find_spec(name).loader.get_code(name)


def find_kernels() -> None:
    """Let tfkit.kernels be found where this is a checkout; where it is installed there is nothing to do."""
    installed = Path(__file__).resolve().parent / "kernels"
    if (FOLDER / "__init__.py").exists() and not installed.exists():
        sys.meta_path.insert(0, Kernels())

"""The reference: everything public stands in it, with the signature of the code and its docstring to the letter."""

import ast
import importlib
import inspect
import re

import pytest

import tfkit
from tfkit.authoring import reference

PAGES = reference.pages()


def entries(page: str) -> dict[str, str]:
    """Name to signature of the directives on a page."""
    return dict(re.findall(r"^`+\{py:(?:function|class|method)\} (\w+)(.*)$", page, re.M))


def test_every_public_name_of_tfkit_is_there():
    for name, module in tfkit._HOMES.items():
        home = getattr(importlib.import_module(f"tfkit.{module}"), name).__module__
        if not home.startswith("tfkit."):
            continue  # another test has put something in its place
        assert name in entries(PAGES[f"reference/{home}"]), f"{name} of {home}"


@pytest.mark.parametrize("module", ["attention", "transformer", "linear_attention"])
def test_a_chapter_has_all_its_exports_with_their_arguments(module):
    zoo, page = importlib.import_module(f"tfkit.zoo.{module}"), PAGES[f"reference/tfkit.zoo.{module}"]
    found = entries(page)
    for name in zoo.__all__:
        value = getattr(zoo, name)
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__doc__:
            inherited = inspect.isclass(value) and "__init__" not in vars(value)  # then its base says it
            names = [] if inherited else [p for p in inspect.signature(value).parameters if p not in ("args", "kwargs")]
            assert name in found and all(re.search(rf"\b{p}\b", found[name]) for p in names), f"{name}: {names}"
            assert inspect.getdoc(value).splitlines()[-1] in page, f"the last line about {name} is missing"
    assert f"](../{next(c for c in tfkit.papers.chapters() if c[3:] == module)}.ipynb)" in page


def test_index_leads_to_every_page_and_kernels_are_read_without_triton():
    for page in PAGES:
        if page != "reference/index":
            assert re.search(rf"^{re.escape(page.removeprefix('reference/'))}$", PAGES["reference/index"], re.M), page
    assert "flash_attention" in entries(PAGES["reference/kernels.flash_attention"])
    assert not any("_runtime" in page or "_rows" in page for page in PAGES)


def test_a_class_shows_its_constructor_and_methods_without_self():
    source = '''
class Layer:
    """One line
    over two.

    y = a * b*  and _x_: kept as written.
    """

    def __init__(self, width: int, heads: int = 2): ...

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]: ...

    def maps(self, x):
        """Where it looks."""

    def _hidden(self):
        """Not shown."""
'''
    text = reference.entry(ast.parse(source).body[0])
    assert entries(text) == {
        "Layer": "(width: int, heads: int=2)",
        "forward": "(x: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']",
        "maps": "(x)",
    }
    assert "One line over two." in text and "```text\ny = a * b*  and _x_: kept as written.\n```" in text
    assert "Where it looks." in text and "_hidden" not in text


def test_a_module_without_public_names_has_no_page(tmp_path):
    (tmp_path / "inner.py").write_text('"""Nothing."""\n\ndef _f():\n    """Hidden."""\n', encoding="utf-8")
    assert reference.module_page("inner", tmp_path / "inner.py") == ""

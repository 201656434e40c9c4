"""The book: built from stored outputs, complete, and without anything that comes from another host."""

import re
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("myst_nb")

from tfkit import papers
from tfkit.authoring import book

pytestmark = pytest.mark.filterwarnings("ignore:.*MystReferenceResolver")  # myst-parser's business
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Page(HTMLParser):
    """The ids, links, sources and picture descriptions of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loads, self.alts = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag == "img":
            self.alts.append(attrs.get("alt"))
        if tag in ("script", "img", "iframe", "source", "video") and "src" in attrs:
            self.loads.append(attrs["src"])
        if tag == "link" and "href" in attrs and attrs.get("rel") != "canonical":
            self.loads.append(attrs["href"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The book of all chapters, and the seconds that it took."""
    started = time.perf_counter()
    folder = book.build(tmp_path_factory.mktemp("book") / "site")
    return {path.name: Page(path) for path in folder.glob("*.html")}, folder, time.perf_counter() - started


@pytest.mark.slow
def test_every_chapter_has_a_page_with_its_pictures(pages):
    there, folder, _ = pages
    for path in book.NOTEBOOKS.glob("[0-9]*.ipynb"):
        nb = nbformat.read(path, as_version=4)
        pictures = sum("image/png" in out.get("data", {}) for cell in nb.cells for out in cell.get("outputs", []))
        found = there[f"{path.stem}.html"]
        assert len(found.alts) >= pictures and all(found.alts), path.stem
        assert any(link.endswith(path.name) and "_downloads" in link for link in found.links), path.stem
    assert (folder / "searchindex.js").stat().st_size > 10_000


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(pages):
    there, folder, _ = pages
    for name, page in there.items():
        elsewhere = [load for load in page.loads if re.match(r"(?i)(https?:)?//", load)]
        assert not elsewhere, f"{name} loads {elsewhere}"
        files = [load.split("?")[0] for load in page.loads if not load.startswith(("data:", "#"))]
        missing = [file for file in files if not (folder / file).exists()]
        assert not missing, f"{name} loads {missing}, which is not there"
    styles = [path for path in (folder / "_static").rglob("*.css")]
    assert not [path for path in styles if re.search(r"url\([\"']?https?:|@import", path.read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_links_between_pages_lead_somewhere(pages):
    there, folder, _ = pages
    for name, page in there.items():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            if target and (not target.endswith(".html") or target.startswith("reference/")):
                assert (folder / target).exists(), f"{name} links to {target}"
            else:
                assert (target or name) in there, f"{name} links to {target}"
                assert not anchor or anchor in there[target or name].ids, f"{name} links to {link}"


@pytest.mark.slow
def test_every_section_of_a_paper_has_an_anchor(pages):
    """What the atlas links to."""
    there, _, _ = pages
    for id, record in papers.collect().items():
        if record.taught:
            link = book.linked(f'href="{record.address}"')
            page, _, anchor = re.fullmatch('href="(.*)"', link)[1].partition("#")
            assert anchor in there[page].ids, f"{id}: {link}"


def small(folder: Path, name="01_attention", source="$x^2$ and [next](01_attention.ipynb)", outputs=()) -> Path:
    cells = [
        new_markdown_cell("# Small"),
        new_markdown_cell(f"## One: `two`\n\n{source}"),
        new_code_cell("#| export\nx = 1", outputs=list(outputs), metadata={"jupyter": {"source_hidden": True}}),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")
    return folder


@pytest.fixture
def no_reference(monkeypatch):
    """A book without its reference is built in a second."""
    monkeypatch.setattr(book.reference, "pages", lambda known: {"reference/index": "# Reference\n"})


def test_a_small_book(tmp_path, no_reference):
    picture = new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": 'a "dot"'}})
    table = new_output("display_data", {"text/html": '<a href="01_attention.ipynb#One:-two">there</a>'})
    (tmp_path / "notebooks").mkdir()
    folder = book.build(tmp_path / "site", small(tmp_path / "notebooks", outputs=[picture, table]))
    text = (folder / "01_attention.html").read_text(encoding="utf-8")
    assert 'alt="a &quot;dot&quot;"' in text and "#| export" not in text and "\\(x^2\\)" in text
    assert re.search(r'toc-tree.*href="#one-two"', text, re.S), "the headings of the page stand beside it"
    assert 'href="01_attention.html#one-two"' in text and 'id="one-two"' in text
    assert (folder / "_static" / "mathjax" / "tex-svg.js").exists() and "hide" in text
    book.build(folder, small(tmp_path / "notebooks"))  # a second time over the first
    assert "a &quot;dot" not in (folder / "01_attention.html").read_text(encoding="utf-8")


def test_a_dead_link_is_an_error_and_keeps_the_old_book(tmp_path, no_reference):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("old")
    (tmp_path / "notebooks").mkdir()
    small(tmp_path / "notebooks", source="[gone](02_gone.ipynb)")
    with pytest.raises(RuntimeError, match="02_gone"):
        book.build(tmp_path / "site", tmp_path / "notebooks")
    assert (tmp_path / "site" / "index.html").read_text() == "old"
    with pytest.raises(ValueError, match="no notebooks"):
        book.build(tmp_path / "site", tmp_path / "site")

"""The course as a web site: `make book` builds it from the stored outputs of the notebooks and executes nothing.

The site works from a folder on disk. Nothing in it asks another host: formulas are set by MathJax from a package, the
full-text search is Sphinx's own, pictures stand inside the pages.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

from tfkit.authoring import reference
from tfkit.authoring.files import NOTEBOOKS, ROOT
from tfkit.papers import chapters

STATIC = Path(__file__).resolve().parent / "static"
CONF = """
project = html_title = "tfkit"
extensions = ["myst_nb", "tfkit.authoring.book"]
exclude_patterns = ["downloads"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 3
toc_object_entries = False
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["atlas.js"]
html_show_copyright = html_show_sphinx = html_copy_source = False
mathjax_path = "mathjax/tex-svg.js"
"""


def build(folder: Path | str, notebooks: Path | str = NOTEBOOKS) -> Path:
    """Write the site into `folder`, replacing an earlier one; returns the folder.

    Raises RuntimeError with Sphinx's messages when a link leads nowhere or a page cannot be read.
    """
    from sphinx.cmd.build import main

    paths = sorted(Path(notebooks).glob("[0-9]*.ipynb"))
    if not paths:
        raise ValueError(f"there are no notebooks in {notebooks}")
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as place:
        source, log = Path(place) / "source", Path(place) / "log"
        shutil.copytree(STATIC, source / "_static")
        (source / "_static" / "mathjax").mkdir()
        shutil.copy(mathjax(), source / "_static" / "mathjax")
        (source / "downloads").mkdir()
        (source / "conf.py").write_text(CONF, encoding="utf-8")
        (source / "index.md").write_text(index(paths), encoding="utf-8")
        for path in paths:
            shutil.copy(path, source / "downloads")
            (source / path.name).write_text(json.dumps(page(path)), encoding="utf-8")
        (source / "reference").mkdir()
        for name, text in reference.pages(known={path.stem for path in paths}).items():
            (source / f"{name}.md").write_text(text, encoding="utf-8")
        made = Path(place) / "made"
        status = main(["-q", "-b", "html", "-W", "--keep-going", "-w", str(log), str(source), str(made)])
        if status:
            said = re.sub(re.escape(str(source)) + "/?", "", log.read_text(encoding="utf-8"))
            raise RuntimeError(f"the book was not built:\n{said}")
        shutil.rmtree(made / ".doctrees", ignore_errors=True)
        replace(folder, made)
    return folder


def replace(folder: Path, made: Path) -> None:
    """Put a copy of the folder `made` in the place of `folder`, whole or not at all."""
    beside, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for left in (beside, old):
        shutil.rmtree(left, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(made, beside)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def mathjax() -> Path:
    """The script that sets formulas as SVG, from an installed package: one file, no fonts to load."""
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None:
        raise RuntimeError("the package sphinx-mathjax-offline is missing; `make setup` installs it")
    return Path(found.submodule_search_locations[0]) / "static" / "mathjax" / "tex-svg.js"


def index(paths: list[Path]) -> str:
    """The front page: the README's words up to its commands, and the chapters by part as the navigation."""
    words = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    words = re.sub(r"!\[([^]]*)\]\([^)]*\)\n\n\*[^*]*\*\n", "", words)
    there, parts = {path.stem for path in paths}, {}
    for name, about in chapters().items():
        if name in there:
            parts.setdefault(about["part"], []).append(f"{name[:2]} {about['title']} <{name}>")
    trees = [
        f"```{{toctree}}\n:caption: {part}\n:maxdepth: 1\n\n" + "\n".join(names) + "\n```"
        for part, names in parts.items()
    ]
    trees.append("```{toctree}\n:caption: Reference\n:maxdepth: 2\n\nreference/index\n```")
    return "\n\n".join([words.strip(), "Every page is a notebook. To run and change it: `make lab`.", *trees])


def page(path: Path) -> dict:
    """A notebook as a page: pictures carry their words, folded cells stay folded, links lead to pages."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell["source"] = re.sub(r"^#\| .*\n?", "", source, flags=re.M)
            if cell["metadata"].get("jupyter", {}).get("source_hidden"):
                cell["metadata"].setdefault("tags", []).append("hide-input")
            cell["outputs"] = [described(output) for output in cell["outputs"]]
        else:
            cell["source"] = linked(source)
    nb["cells"][0]["source"] += (
        f"\n\n```{{admonition}} Run it\n:class: tip\nThis page shows stored results. To change things, open "
        f"`notebooks/{path.name}` in JupyterLab with `make lab`, or take {{download}}`this notebook "
        f"<downloads/{path.name}>` with you.\n```"
    )
    return nb


def described(output: dict) -> dict:
    """A picture output as an <img> with its alt text; other outputs with their links turned into links to pages."""
    data = output.get("data", {})
    if "image/png" in data:
        alt = html.escape(output.get("metadata", {}).get("image/png", {}).get("alt", ""))
        code = "".join(data["image/png"]).replace("\n", "")
        data = {"text/html": f'<img class="figure" alt="{alt}" src="data:image/png;base64,{code}">'}
    elif "text/html" in data:
        data = {"text/html": linked("".join(data["text/html"]))}
    else:
        return output
    return {**output, "data": data, "metadata": {}}


def linked(text: str) -> str:
    """Links to sections of notebooks as links to sections of pages."""
    from docutils.nodes import make_id

    def page_link(found: re.Match) -> str:
        anchor = make_id(html.unescape(found[3]).replace("-", " "))
        return f"{found[1]}{found[2]}.html#{anchor}{found[4]}"

    text = re.sub(r"(href=\")(\d\d_\w+)\.ipynb#([^\"]*)(\")", page_link, text)
    return re.sub(r"(href=\"\d\d_\w+)\.ipynb(\")", r"\1.html\2", text)


def setup(app) -> dict:
    """What Sphinx calls: keeps the cost of a page the same however many pages and names the book has.

    The sidebar of every page lists all pages. Sphinx copies all their headings for it and then drops them, so only the
    titles are left to copy; the headings of a page, at its right, are set from what was put aside. Types in signatures
    stay words: each would be looked for among all names of the reference.
    """
    from docutils import nodes
    from sphinx.addnodes import pending_xref, toctree

    headings = {}

    def types_are_words(app, doctree):
        for node in [node for node in doctree.findall(pending_xref) if node.get("refdomain") == "py"]:
            node.replace_self(node.children)

    def only_titles(app, env):
        for name, toc in env.tocs.items():
            if toc.children and not list(toc.findall(toctree)):
                headings[name] = toc
                title = toc[0].copy()
                title += toc[0][0].deepcopy()
                env.tocs[name] = toc.copy()
                env.tocs[name] += title

    def set_headings(app, name, template, context, doctree):
        if name in headings:
            toc = headings[name].deepcopy()
            for link in toc.findall(nodes.reference):
                link["refuri"] = link["anchorname"] or "#"
            context["toc"] = app.builder.render_partial(toc)["fragment"]
            context["furo_hide_toc"] = len(list(toc.findall(nodes.reference))) < 2

    app.connect("doctree-read", types_are_words)
    app.connect("env-updated", only_titles)
    app.connect("html-page-context", set_headings, priority=900)  # after the theme's
    return {"parallel_read_safe": True}

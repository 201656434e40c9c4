"""Notebook to module, stable cell ids, execution that stores all or nothing."""

import ast
import json
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tfkit.authoring import notebooks

EXPORTED = """#| export
from tfkit import data
from tfkit.zoo.attention import attention


def twice(x):
    return 2 * x"""


def write(folder, name="90_toy", cells=None):
    cells = cells or [
        new_code_cell("#| default_exp zoo.toy"),
        new_markdown_cell("# Toy"),
        new_code_cell(EXPORTED),
        new_code_cell("secret = twice(3)\nprint(secret)"),
        new_code_cell("#| export\nclass Thing:\n    '''A thing.'''\n\n    size = twice(2)\n\n\n_hidden = 1"),
    ]
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture
def house(tmp_path):
    """An empty checkout."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "tfkit" / "zoo").mkdir(parents=True)
    return tmp_path


def test_module_text_holds_the_exported_cells_alone(tmp_path):
    here = os.getcwd()
    path = write(tmp_path)
    name, text = notebooks.module_text(path)
    assert name == "zoo/toy.py" and os.getcwd() == here
    tree = ast.parse(text)
    compile(text, name, "exec")
    assert {n.name for n in tree.body if hasattr(n, "name")} == {"twice", "Thing"}
    assert "secret" not in text and "#| " not in text
    imports = {(n.level, n.module): [a.name for a in n.names] for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert imports == {
        (2, None): ["data"],
        (1, "attention"): ["attention"],
    }  # from .. import data, from .attention import
    offered = next(n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    assert ast.literal_eval(offered.value) == ["twice", "Thing"]
    marks = {line for line in text.splitlines() if line.startswith("# %%")}
    assert marks == {"# %% notebooks/90_toy.ipynb"} and str(tmp_path) not in text
    assert notebooks.module_text(path) == (name, text)


def test_a_notebook_may_export_nothing(tmp_path):
    assert notebooks.module_text(write(tmp_path, cells=[new_code_cell("x = 1")])) is None


def test_a_chapter_has_one_module(tmp_path):
    sources = ["#| default_exp zoo.toy", "#| export\na = 1", "#| export zoo.other\nb = 1"]
    here = os.getcwd()
    with pytest.raises((ValueError, AssertionError), match="zoo/other.py does not exist|exports to 2 modules"):
        notebooks.module_text(write(tmp_path, cells=[new_code_cell(source) for source in sources]))
    assert os.getcwd() == here


def test_export_writes_only_what_changed(house):
    path = write(house / "notebooks")
    assert notebooks.export(path) == "tfkit/zoo/toy.py"
    module = house / "tfkit" / "zoo" / "toy.py"
    assert module.read_text() == notebooks.module_text(path)[1]
    os.utime(module, (1, 1))
    notebooks.export(path)
    assert module.stat().st_mtime == 1
    module.write_text("edited by hand")
    notebooks.export(path)
    assert module.read_text() == notebooks.module_text(path)[1]
    assert notebooks.export(write(house / "notebooks", "91_none", [new_code_cell("x = 1")])) == ""


def test_tidy_gives_ids_that_depend_on_the_source_alone(tmp_path):
    def cells():
        noisy = new_code_cell("x = 1", metadata={"execution": {"start": "now"}, "tags": ["slow"], "reason": "it is"})
        return [noisy, new_code_cell("x = 1"), new_markdown_cell("text"), new_code_cell("y = 2", execution_count=3)]

    texts = []
    for name in ("01_a", "02_b"):
        path = write(tmp_path, name, cells())
        notebooks.tidy(path)
        texts.append(path.read_text())
        notebooks.tidy(path)
        assert path.read_text() == texts[-1]
    assert texts[0] == texts[1]
    nb = nbformat.reads(texts[0], as_version=4)
    nbformat.validate(nb)
    ids = [cell.id for cell in nb.cells]
    assert len(set(ids)) == 4 and ids[1] == f"{ids[0]}-2"
    assert nb.cells[0].metadata == {"tags": ["slow"], "reason": "it is"}
    assert json.loads(texts[0])["metadata"]["language_info"] == {"name": "python"}

    more = write(tmp_path, "03_c", [new_markdown_cell("new first"), *cells()])
    notebooks.tidy(more)
    assert [cell.id for cell in nbformat.read(more, as_version=4).cells][1:] == ids


def test_a_run_stores_what_was_printed(house):
    path = write(house / "notebooks")
    said = notebooks.run(path)
    assert said.startswith("90_toy: ") and said.endswith(" KB")
    nb = nbformat.read(path, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4] and code[2].outputs[0].text == "6\n"
    assert all("execution" not in cell.metadata for cell in code)
    again = path.read_text()
    notebooks.run(path)
    assert path.read_text() == again


def test_a_run_that_stops_keeps_the_stored_notebook(house):
    from nbclient.exceptions import CellExecutionError

    path = write(house / "notebooks", cells=[new_code_cell("print(1)"), new_code_cell("1 / 0")])
    notebooks.tidy(path)
    before = path.read_text()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.run(path)
    assert path.read_text() == before


FULL_DISK = """
import pathlib, resource, sys
from tfkit.authoring import notebooks
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow beyond 20 kB, as on a full disk
notebooks.run(pathlib.Path(sys.argv[1]))
"""


def test_a_full_disk_keeps_the_stored_notebook(house):
    path = write(house / "notebooks", cells=[new_code_cell("print('9 ' * 20_000)")])
    notebooks.tidy(path)
    before = path.read_text()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, timeout=120)
    assert done.returncode and "OSError" in done.stderr, done.stderr[-500:]
    assert path.read_text() == before
    assert [found.name for found in path.parent.iterdir()] == [path.name], "something is left beside the notebook"

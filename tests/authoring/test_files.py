"""Finding chapters, writing whole files or none, and the command line."""

import errno
import os
import stat

import pytest

from tfkit.authoring import files
from tfkit.authoring.__main__ import main


def test_find(tmp_path):
    first, second = tmp_path / "01_attention.ipynb", tmp_path / "02_transformer.ipynb"
    for path in (first, second):
        path.write_text("{}")
    for name in ("01", "01_attention", "01_attention.ipynb"):
        assert files.find(name, tmp_path) == first
    assert files.find("02", tmp_path) == second
    for wrong in ("1", "03", "attention", "0"):
        with pytest.raises(SystemExit, match=f"{wrong!r}; there are: 01_attention, 02_transformer. Use"):
            files.find(wrong, tmp_path)


def test_a_file_is_written_as_it_would_be_without_us(tmp_path):
    path, plain = tmp_path / "a ü.txt", tmp_path / "plain"
    files.write(path, "⟨1⟩\n")
    plain.write_text("")
    assert path.read_text(encoding="utf-8") == "⟨1⟩\n" and path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    files.write(str(path), b"\x00bytes")
    assert path.read_bytes() == b"\x00bytes" and stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link"
    link.symlink_to(path.name)
    files.write(link, "through the link")
    assert link.is_symlink() and path.read_text() == "through the link"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a ü.txt", "link", "plain"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, step):
    path = tmp_path / "a"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_command_line_says_what_it_takes(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["fly"])
    assert "export" in capsys.readouterr().err
    for command in ("run", "assignment"):
        with pytest.raises(SystemExit, match=f"which chapter\\? make {command} NB=11"):
            main([command])


def test_an_error_of_the_disk_is_one_sentence(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tfkit.authoring.tables.write_tables", full)
    with pytest.raises(SystemExit, match="readme stopped, and what was stored is as it was: .*No space left"):
        main(["readme"])

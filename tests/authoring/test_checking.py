"""One line per finding, and processor time that a busy machine does not change."""

import subprocess
import sys
from xml.sax.saxutils import quoteattr

from tfkit.authoring import checking


def case(classname: str, name: str, message: str, body: str = "") -> str:
    told = f"<failure message={quoteattr(message)}>{body}</failure>"
    return f"<testcase classname={quoteattr(classname)} name={quoteattr(name)}>{told}</testcase>"


RULE = """AssertionError: narrow lines: break the line
    cell 3 ('x') has more than 88 columns
    cell 4 ('y') too
assert not ['cell 3', 'cell 4']"""
BODY = "".join(f"E   {line}\n" for line in RULE.splitlines())
REPORT = "\n".join(
    [
        "<testsuites><testsuite>",
        case("tests.house.test_rules", "test_chapter[20_x-narrow_lines]", "cut off", BODY),
        case("tests.zoo.test_x", "test_a", "assert 384 == 383: nothing is said"),
        case("notebooks/20_x.ipynb", "Cell 3", "", "Notebook cell execution failed\nE  the outputs differ"),
        '<testcase classname="tests.zoo.test_x" name="test_b"/>',
        "</testsuite></testsuites>",
    ]
)


def test_each_problem_of_a_rule_and_each_failed_test_is_one_line():
    assert checking.findings(REPORT) == [
        "narrow lines: cell 3 ('x') has more than 88 columns. To mend it: break the line",
        "narrow lines: cell 4 ('y') too. To mend it: break the line",
        "tests/zoo/test_x::test_a: assert 384 == 383: nothing is said",
        "notebooks/20_x/ipynb::Cell 3: the outputs differ",
    ]


def test_processor_time_counts_what_a_child_waited_for_and_no_sleep():
    python = [sys.executable, "-I", "-S", "-c"]
    burn = "import time\nwhile time.process_time() < 1.5: pass"
    _, busy = checking.timed([*python, f"import subprocess; subprocess.run({[*python, burn]})"])
    _, idle = checking.timed([*python, "import time; time.sleep(1.5)"])
    assert busy > 1.5 > 2 * idle


def test_findings_of_a_run(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-p no:cacheprovider"\n')
    (tmp_path / "test_it.py").write_text("def test_bad():\n    assert 1 == 2, 'one is not two'\n")
    found, seconds = checking.pytest("test_it.py", root=tmp_path)
    assert found == ["test_it::test_bad: one is not two assert 1 == 2"] and seconds > 0
    assert checking.pytest("test_it.py", "-k", "nothing_at_all", root=tmp_path)[0] == []
    found, _ = checking.pytest("no_such_file.py", root=tmp_path)
    assert "no_such_file.py stopped: " in found[0]


def test_the_table_of_times_keeps_other_chapters_and_forgets_the_gone(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("01_a", "02_b"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text("{}")
    assert checking.read_times(tmp_path) == {}
    checking.record({"01_a": {"notebook": 12.4, "tests": 3.1}, "09_gone": {"notebook": 1}}, tmp_path)
    checking.record({"02_b": {"notebook": 50.6}}, tmp_path)
    assert checking.read_times(tmp_path) == {
        "01_a": {"notebook": 12, "tests": 3},
        "02_b": {"notebook": 51, "tests": 0},
    }
    path = tmp_path / "notebooks" / "results" / "times.csv"
    path.write_text(path.read_text() + "01_a,20,5\n")  # as after a merge that kept both lines
    assert checking.read_times(tmp_path)["01_a"] == {"notebook": 20, "tests": 5}


def test_the_machine_is_named_in_words_alone():
    assert checking.machine() and not any(letter.isdigit() for letter in checking.machine())


def test_the_steps_of_a_chapter():
    from tfkit.authoring.files import find

    steps = checking.steps(find("11"))
    assert steps["notebook"] == ["notebooks/11_linear_attention.ipynb"]
    assert steps["tests"] == ["tests/zoo/test_linear_attention.py"] and checking.steps(find("00"))["tests"] == []
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-q", *steps["house"]]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    for rule in ("narrow_lines", "rows_done", "test_exercises", "test_every_chapter_becomes_an_assignment"):
        assert rule in listed
    assert "[01_attention" not in listed

"""Setting up: the lists of packages agree, the wheel works away from the checkout, mistakes get one sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tfkit.papers import coverage

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)


# --- environment.yml, constraints.txt and pyproject.toml


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), "each line of constraints.txt is name==version"
    names = [normal(match[1]) for match in found]
    assert len(names) == len(set(names)), "constraints.txt pins a package twice"
    return {normal(match[1]): match[2] for match in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asked() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [r for r in map(Requirement, [*PROJECT["dependencies"], *extras]) if r.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", asked(), ids=lambda r: r.name)
def test_every_package_is_pinned_within_its_range(requirement):
    pinned = pins()
    assert normal(requirement.name) in pinned, f"pin {requirement.name} in constraints.txt"
    version = pinned[normal(requirement.name)]
    assert version in requirement.specifier, (
        f"constraints.txt pins {version}; pyproject.toml asks for {requirement}"
    )


def needs(name: str, extras=()) -> list[Requirement]:
    """What an installed package asks for here."""
    wanted = [{"extra": extra} for extra in [*extras, ""]]
    found = map(Requirement, metadata.requires(name) or [])
    return [r for r in found if r.marker is None or any(r.marker.evaluate(extra) for extra in wanted)]


@pytest.mark.skipif(
    sys.platform != "linux", reason="the pins are complete for Linux; other systems need a few more"
)
def test_what_the_packages_need_is_pinned_too():
    """Else an installation next year brings other versions than the ones that the stored outputs come from."""
    pinned, open_, seen = pins(), {normal(r.name): r.extras for r in asked()}, set()
    contradicted = []
    while open_:
        name, extras = open_.popitem()
        seen.add(name)
        for need in needs(name, extras):
            if normal(need.name) not in seen:
                open_[normal(need.name)] = need.extras
            contradicted += contradictions(f"{name} {metadata.version(name)}", [need])
    devices = {name for name in seen if name.startswith(("nvidia-", "cuda-"))}  # come with the CUDA build of torch
    assert not (missing := seen - set(pinned) - devices), f"pin in constraints.txt: {', '.join(missing)}"
    assert not contradicted, "; ".join(contradicted)


def contradictions(who: str, needed: list[Requirement]) -> list[str]:
    """The pins that a package which needs these could not be installed with."""
    pinned = pins()
    return [
        f"{who} needs {need}, and constraints.txt pins {pinned[normal(need.name)]}"
        for need in needed
        if normal(need.name) in pinned and pinned[normal(need.name)] not in need.specifier
    ]


def test_a_contradiction_is_found():
    (found,) = contradictions("torch 2.13.0", [Requirement("triton==0.0.1"), Requirement("unknown==1")])
    assert found == f"torch 2.13.0 needs triton==0.0.1, and constraints.txt pins {pins()['triton']}"


def test_the_pins_suit_the_torch_that_pypi_serves(tmp_path, online):
    """The installed torch may be another build: one for CPUs alone asks for no Triton, PyPI's for Linux names one."""
    if int(metadata.version("pip").split(".")[0]) < 24:
        pytest.skip("pip before 24 loads the whole of torch to read what it needs")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        online.pop(name, None)
    online["PIP_CONFIG_FILE"] = os.devnull
    lazily = "--use-feature=fast-deps --dry-run --no-deps --ignore-installed --only-binary=:all: --retries 0 --quiet"
    asks = [sys.executable, "-m", "pip", "install", *lazily.split(), "--report", "-", f"torch=={pins()['torch']}"]
    done = run(*asks, cwd=tmp_path, env=online)
    versions = re.search(r"from versions: (.*)\)", done.stderr)
    assert not versions or versions[1] == "none", f"PyPI has no torch {pins()['torch']}, but {versions[1]}"
    if done.returncode:
        pytest.skip(f"PyPI cannot be asked from here: {' '.join(done.stderr.splitlines()[-1:])}")
    (torch,) = (found["metadata"] for found in json.loads(done.stdout)["install"])
    needed = [r for r in map(Requirement, torch["requires_dist"]) if not r.marker or r.marker.evaluate({"extra": ""})]
    assert sys.platform != "linux" or "triton" in {r.name for r in needed}, "torch was expected to name its Triton"
    assert not (found := contradictions(f"torch {torch['version']}", needed)), "; ".join(found)


def test_conda_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == "tfkit"
    by_name = {part.split("=")[0]: part for part in environment["dependencies"] if isinstance(part, str)}
    (by_pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert set(by_name) == {"python", "pip"}, "packages come from pip, so that conda and make install the same"
    assert by_pip == ["-c constraints.txt", "-e .[dev]"]
    assert by_name["python"].split("=")[1] in SpecifierSet(PROJECT["requires-python"])
    assert "-c constraints.txt -e '.[dev]'" in (ROOT / ".ci" / "setup").read_text(encoding="utf-8")


def test_version_and_title_are_the_same_everywhere():
    import tfkit

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert tfkit.__version__ == PROJECT["version"] == citation["version"]
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert [author["name"].lower() for author in citation["authors"]] == [a["name"] for a in PROJECT["authors"]]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")


def test_a_total_that_is_written_down_is_the_table_s():
    from tfkit.papers import papers

    for name in ("README.md", "CITATION.cff", "pyproject.toml", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for total in map(int, re.findall(r"\b(\d{2,}) papers\b", text)):
            assert total == len(papers()), f"{name} speaks of {total} papers; tfkit/papers.csv has {len(papers())}"


# --- importing


def test_importing_tfkit_costs_next_to_nothing_beyond_torch():
    program = """
import sys, torch
before = set(sys.modules)
import tfkit
dir(tfkit), dir(tfkit.zoo)
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("importlib")))
"""
    done = run(sys.executable, "-c", program, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) < 12, f"`import tfkit` loads {done.stdout}"


def test_the_models_load_when_they_are_named():
    import tfkit

    assert {"attention", "transformer"} <= set(dir(tfkit.zoo)) and tfkit.zoo.attention.__name__ == "tfkit.zoo.attention"
    with pytest.raises(AttributeError, match="'tfkit.zoo' has no attribute 'atention'; it has .*attention"):
        _ = tfkit.zoo.atention


def test_every_module_is_reached_by_its_name():
    import tfkit

    files = {path.stem for path in (ROOT / "tfkit").glob("[a-z]*.py")}
    folders = {path.parent.name for path in (ROOT / "tfkit").glob("*/__init__.py")} - {"authoring"}
    listed = set(tfkit._MODULES)
    assert listed - {"kernels"} == files | folders, "list the modules of tfkit/ in tfkit/__init__.py, _MODULES"


KERNELS = """
import sys
import tfkit.kernels.softmax
from tfkit.kernels import rotary, softmax
import kernels
print(kernels.__file__, tfkit.kernels.__file__, rotary.__name__)
try:
    import tfkit.kernels.nothing
except ModuleNotFoundError as error:
    print(error.name)
"""


def test_in_the_checkout_the_kernels_have_one_copy_under_two_names():
    program = KERNELS + "import kernels.softmax; print(kernels.softmax is softmax, tfkit.kernels is kernels)"
    done = run(sys.executable, "-c", program, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ours = ROOT / "kernels" / "__init__.py"
    assert done.stdout.split() == [str(ours), str(ours), "kernels.rotary", "tfkit.kernels.nothing", "True", "True"]


@pytest.mark.parametrize("name", ["kernels.bench", "tfkit.kernels.bench"])
def test_the_benchmark_runs_under_both_names(name):
    done = run(sys.executable, "-m", name, "--help", cwd=ROOT)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_beside_another_package_called_kernels_both_work(tmp_path):
    """Hugging Face publishes one, and transformers imports it where it is there."""
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("", encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run(sys.executable, "-c", KERNELS, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    ours = ROOT / "kernels" / "__init__.py"
    assert done.stdout.split() == [str(theirs), str(ours), "tfkit.kernels.rotary", "tfkit.kernels.nothing"]


# --- the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which the wheel of a copy of the checkout was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("tfkit", "kernels", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    assert built.returncode == 0, built.stdout[-1500:] + built.stderr[-1500:]
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    got = run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
        cwd=folder,
    )
    assert got.returncode == 0, got.stderr
    return target


def test_the_wheel_holds_one_package_and_all_of_it(installed):
    """One name at the top: a second one, such as kernels, would overwrite another project's."""
    there = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert there == {"tfkit"}, f"the wheel installs {sorted(there)}"
    kinds = {
        "tfkit": ("*.py", "*.csv", "py.typed", "static/*"),
        "kernels": ("*.py",),
        "notebooks": ("[0-9]*.ipynb", "README.md", "*.png", "results/*"),
    }
    for name, patterns in kinds.items():
        home = installed / "tfkit" / ("" if name == "tfkit" else name)
        files = {path.relative_to(ROOT / name) for kind in patterns for path in (ROOT / name).rglob(kind)}
        files = {path for path in files if "__pycache__" not in path.parts and ".ipynb_checkpoints" not in path.parts}
        missing = {path.as_posix() for path in files if not (home / path).exists()}
        assert files and not missing, f"pyproject.toml ships no {', '.join(sorted(missing))} of {name}/"


def test_the_wheel_works_outside_the_checkout(installed, tmp_path):
    program = f"""
import sys
sys.path[:] = [p for p in sys.path if p and p != {str(ROOT)!r}]
sys.path.insert(0, {str(installed)!r})
import tfkit, tfkit.zoo, tfkit.kernels, pkgutil, importlib
from tfkit.papers import chapters, collect, coverage, lookup, papers
for module in (tfkit, tfkit.zoo, tfkit.kernels):
    assert module.__file__.startswith({str(installed)!r}), module.__file__
for name in tfkit._MODULES:
    getattr(tfkit, name)
for folder in (tfkit.zoo, tfkit.kernels):
    for found in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(folder.__name__ + "." + found.name)
assert len(papers()) == len(collect()) > 300 and len(chapters()) > 50
print(coverage())
print(lookup("linformer"))
from tfkit.__main__ import main
assert main(["--notebooks", "course"]) == 0
"""
    # -E and -P keep the environment and the working folder out of sys.path
    done = run(sys.executable, "-E", "-P", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count, title, *rest = done.stdout.splitlines()
    assert count == str(coverage()), "the installed package and the checkout count other papers"
    assert title.startswith("Linformer") and "begin with" in rest[-1]
    copied = {path.name for path in (tmp_path / "course").glob("*.ipynb")}
    assert copied == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert (tmp_path / "course" / "results" / "long_range_arena.csv").exists()


# --- make and .ci/setup


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files that set-up reads, in a folder of their own."""
    (tmp_path / ".ci").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/setup"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    """Set-up with the tools that every system has, and no uv but one in the folder tools."""
    path = os.pathsep.join([str(checkout / "tools"), "/usr/bin", "/bin"])
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return run("bash", ".ci/setup", cwd=checkout, env={**plain, "PATH": path, **environment})


def test_a_wrong_python_gets_one_plain_sentence(checkout):
    old = script(checkout / "python3.9", '[ "$1" = --version ] && echo "Python 3.9.18" || exit 1')
    done = setup(checkout, PYTHON=str(old))
    assert done.returncode != 0 and not done.stdout
    assert re.fullmatch(r"tfkit needs Python 3\.11 .*3\.12 or 3\.13, and found Python 3\.9\.18\. .+\n", done.stderr)
    missing = setup(checkout, PYTHON="no-such-python")
    assert missing.returncode != 0 and missing.stderr.count("\n") == 1 and "no-such-python" in missing.stderr
    assert not (checkout / ".venv").exists()


def fake_python(checkout: Path, pip: str) -> str:
    """A Python that makes environments holding itself; `pip` is what it does when asked to install."""
    fake = checkout / "fake" / "python"
    return str(
        script(
            fake,
            f'case "$*" in\n'
            f'*"-m venv"*) mkdir -p .venv/bin && cp "{fake}" .venv/bin/python ;;\n'
            f'*"-m pip"*) echo "$*" >>"{checkout}/calls"; {pip} ;;\n'
            f"esac",
        )
    )


def test_packages_are_installed_once(checkout):
    python = fake_python(checkout, "true")
    first = setup(checkout, PYTHON=python)
    assert first.returncode == 0, first.stderr
    said = calls(checkout)
    assert said.count("install") == 1 and "-c constraints.txt" in said and ".[dev]" in said
    again = setup(checkout, PYTHON=python)
    assert again.returncode == 0 and not again.stdout + again.stderr
    assert not calls(checkout), "nothing changed, yet pip ran again"
    with (checkout / "constraints.txt").open("a", encoding="utf-8") as file:
        file.write("# another pin\n")
    setup(checkout, PYTHON=python)
    assert "install" in calls(checkout), "the pins changed, and pip did not run"


def test_a_failed_installation_gets_one_plain_sentence_and_is_tried_again(checkout):
    python = fake_python(checkout, 'echo "ERROR: No matching distribution found for torch==2.13.0"; exit 1')
    for _ in range(2):
        done = setup(checkout, PYTHON=python)
        assert done.returncode != 0
        assert done.stderr.count("\n") == 1 and "No matching distribution found for torch" in done.stderr
    assert calls(checkout).count("install") == 2


def fake_uv(checkout: Path, does: str = "true") -> None:
    script(checkout / "tools" / "uv", f'echo "uv $*" >>"{checkout}/calls"; {does}')


def calls(checkout: Path) -> str:
    file = checkout / "calls"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    file.unlink(missing_ok=True)
    return "\n".join(line for line in text.splitlines() if "config list" not in line)


def test_uv_is_used_where_it_is_installed_and_pip_when_it_fails(checkout):
    fake_uv(checkout)
    assert setup(checkout, PYTHON=fake_python(checkout, "true")).returncode == 0
    assert calls(checkout) == "uv pip install --python .venv/bin/python -c constraints.txt -e .[dev]"
    shutil.rmtree(checkout / ".venv")
    fake_uv(checkout, "exit 2")
    assert setup(checkout, PYTHON=fake_python(checkout, "true")).returncode == 0
    first, second = calls(checkout).splitlines()
    assert first.startswith("uv ") and "-m pip install" in second


def test_pip_is_used_where_it_is_told_of_other_places(checkout):
    fake_uv(checkout)
    told = "case \"$*\" in *\"config list\") echo \"global.find-links='/wheels'\" ;; esac"
    assert setup(checkout, PYTHON=fake_python(checkout, told)).returncode == 0
    assert "uv" not in calls(checkout).replace("-c constraints.txt uv", "")


@pytest.mark.skipif(sys.platform == "darwin", reason="torch for macOS has one build")
def test_another_build_of_torch_is_chosen_and_remembered(checkout):
    fake_uv(checkout)
    python = fake_python(checkout, "true")
    assert setup(checkout, PYTHON=python, TORCH="cpu").returncode == 0
    assert "uv pip install --python .venv/bin/python --torch-backend cpu" in calls(checkout)
    again = setup(checkout, PYTHON=python)
    assert again.returncode == 0 and not calls(checkout) and not again.stdout
    (checkout / "constraints.txt").open("a", encoding="utf-8").write("# changed\n")
    assert setup(checkout, PYTHON=python).returncode == 0
    assert "--torch-backend cpu" in calls(checkout), "new pins forgot which build of torch was asked for"
    assert setup(checkout, PYTHON=python, TORCH="auto").returncode == 0
    assert "--torch-backend auto" in calls(checkout)


@pytest.mark.skipif(sys.platform == "darwin", reason="torch for macOS has one build")
def test_where_uv_is_missing_and_needed_pip_brings_it(checkout):
    fake_uv(checkout)
    (checkout / "tools").rename(checkout / "kept")  # not where programs are looked for
    brings = 'case "$*" in *" uv") cp kept/uv .venv/bin/uv ;; esac'
    assert setup(checkout, PYTHON=fake_python(checkout, brings), TORCH="cpu").returncode == 0
    first, second = calls(checkout).splitlines()
    assert first.endswith("install --disable-pip-version-check -c constraints.txt uv")
    assert second.startswith("uv pip install") and "--torch-backend cpu" in second


def test_what_was_installed_under_the_old_name_leaves(checkout):
    python = fake_python(checkout, "true")
    setup(checkout, PYTHON=python)
    assert "uninstall" not in calls(checkout)
    old = checkout / ".venv" / "lib" / "python3.12" / "site-packages" / "tfkit-0.1.0.dist-info"
    old.mkdir(parents=True)
    (old / "direct_url.json").touch()
    (checkout / ".venv" / ".installed").write_text("123 45", encoding="utf-8")
    assert setup(checkout, PYTHON=python).returncode == 0
    first, second = calls(checkout).splitlines()
    assert first.endswith("-m pip uninstall --yes tfkit")
    assert "install --disable" in second and "uv" not in second


def test_a_folder_that_cannot_be_written_gets_one_plain_sentence(checkout):
    for path in [checkout, *checkout.rglob("*")]:
        path.chmod(0o555)
    if os.access(checkout, os.W_OK):
        pytest.skip("the superuser may write everywhere")
    done = setup(checkout)
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr


def test_make_alone_lists_the_commands(checkout):
    listed = run("make", cwd=checkout)
    assert listed.returncode == 0, listed.stderr
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()) - {"help", "setup"}
    missing = {name for name in targets if f"make {name} " not in listed.stdout}
    assert not missing, f"give {', '.join(missing)} a description in the Makefile: `name:  ## what it does`"
    assert not (checkout / ".venv").exists(), "listing the commands should not set anything up"

"""Settings for every test and notebook under pytest. It stands here because `pytest notebooks` does not read tests/."""

import atexit
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec

import pytest

# Set before anything imports torch or matplotlib. Test workers and notebook kernels inherit all of it.
os.environ["TFKIT_STATIC"] = "1"  # widgets draw their default picture, training shows no progress bar
os.environ["MPLBACKEND"] = "Agg"
os.environ["PYTHONUTF8"] = "1"  # whatever the locale
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Pictures depend neither on the user's settings of matplotlib nor on her list of fonts, which may be out of date.
    # The list is made here once: a notebook that had to make it would say so on stderr.
    os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="tfkit-matplotlib-")
    atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], stderr=subprocess.DEVNULL)
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # as many workers as cores, one thread each; `make test-portable` asks for two
if not os.path.exists("/proc/driver/nvidia"):
    os.environ["TRITON_INTERPRET"] = "1"  # no GPU: whatever imports Triton first, kernels run in its interpreter
# No test or notebook uses the network. Child processes find a proxy that refuses; this process has a guard below.
os.environ["HF_HUB_OFFLINE"] = "1"
# The one test that asks PyPI a question (it skips offline) takes back what stood here, through the fixture `online`.
_PROXIES = [set_ for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for set_ in (name, name.upper())]
os.environ.setdefault("TFKIT_PROXIES", json.dumps({name: os.environ[name] for name in _PROXIES if name in os.environ}))
for name in _PROXIES:
    os.environ[name] = "localhost,127.0.0.1,::1" if name.lower() == "no_proxy" else "http://127.0.0.1:9"

# Shapes in the signatures of tfkit.zoo are checked at every call of the test run. This must precede its first import.
try:
    from jaxtyping import install_import_hook
except ModuleNotFoundError:
    pytest.exit(
        "the test packages are missing here; `make test` installs them, or: pip install -c constraints.txt -e '.[dev]'",
        4,
    )
install_import_hook("tfkit.zoo", "beartype.beartype")

_connect = socket.socket.connect


def _loopback_only(self, address):
    host = address[0] if isinstance(address, tuple) else ""
    if self.family != socket.AF_UNIX and host not in ("localhost", "::1") and not str(host).startswith("127."):
        raise OSError(f"a test tried to connect to {host}; tests and notebooks work offline")
    return _connect(self, address)


socket.socket.connect = _loopback_only


def pytest_report_header():
    if find_spec("triton") is None:
        return "Triton is not installed (it exists for Linux): tests/kernels and chapters 70 to 75 are skipped"


def pytest_ignore_collect(collection_path):
    """Chapters that launch kernels need Triton; their reference cells run without it, their kernels do not."""
    if find_spec("triton") is None and re.match(r"7[0-5]_.*\.ipynb$", collection_path.name):
        return True


def pytest_collection_modifyitems(config, items):
    """The browser test starts a server and a browser, so it runs only when asked for."""
    if "browser" in config.option.markexpr or os.environ.get("TFKIT_BROWSER"):
        return
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason="drives a browser; run `make test-browser`"))


@pytest.fixture
def online() -> dict[str, str]:
    """The environment for a child process that may use the network; the test skips where there is none."""
    own = {name: value for name, value in os.environ.items() if name not in _PROXIES}
    return own | json.loads(os.environ["TFKIT_PROXIES"])


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it in its worker."""
    from tfkit import set_seed

    set_seed(0)

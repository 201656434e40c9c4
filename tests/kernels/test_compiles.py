"""Every kernel compiles for a GPU of compute capability 9.0, also where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import HAS_GPU

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(HAS_GPU, reason="there is a GPU here, and the other tests run on it")
DEFINED_WRONG = """
import torch
from kernels._runtime import check, empty, jit, tl

@jit
def _wrong(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))

def run(x):
    check("run", x=x)
    out = empty(x.shape, like=x)
    _wrong[(1,)](x, out, BLOCK=6)
    return out
"""


def python(*arguments, folder):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path):
    found = python("-m", "tests.kernels.compile_for", "cuda:90", folder=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    there = {p.stem for p in (ROOT / "kernels").glob("[a-z]*.py") if "def benchmarks" in p.read_text(encoding="utf-8")}
    assert len(found.stdout.splitlines()) >= 2 * len(there - {"bench"})


def test_what_a_gpu_cannot_compile_is_found(tmp_path):
    (tmp_path / "wrong.py").write_text(DEFINED_WRONG)
    script = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
from tests.kernels import compile_for
import torch, wrong
with compile_for._compile.only_compiled("cuda:90"):
    wrong.run(torch.zeros(6, device="meta"))
"""
    found = python("-c", script, folder=tmp_path)
    assert found.returncode and "power of 2" in found.stderr, found.stderr[-500:]

"""The package as a whole: its name, its modes, machines without Triton, and the unrelated `kernels` of PyPI."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import DEVICE, HAS_TRITON, INTERPRET, guarded, jit, tl
from kernels._runtime import accumulator, check, empty, in_shared, operand, precision

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = sorted(p.stem for p in (ROOT / "kernels").glob("[a-z]*.py") if p.stem != "bench")


def python(script, **environment):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=keep | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", MODULES)
def test_module_and_function_share_a_name(name):
    module = __import__(f"kernels.{name}", fromlist=[name])
    assert callable(getattr(module, {"packing": "pack", "scan": "linear_scan"}.get(name, name)))
    assert callable(module.reference) and module.__doc__


def test_transformers_models_build_and_run_beside_ours():
    """`transformers` looks for a package called kernels on PyPI; ours must not be taken for it."""
    found = python(
        "import kernels, torch, transformers\n"
        "config = transformers.LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1,"
        " num_attention_heads=2)\n"
        "model = transformers.LlamaForCausalLM(config)\n"
        "print(kernels.__file__, model(torch.tensor([[1, 2, 3]])).logits.shape)"
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert str(ROOT / "kernels") in found.stdout and "[1, 3, 11]" in found.stdout


# --- without Triton

WITHOUT = """
import importlib.util, warnings
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
"""


def test_without_triton_the_import_says_so_and_references_run():
    script = WITHOUT + (
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    import kernels\n"
        "print([str(w.message) for w in said if 'Triton' in str(w.message)])\n"
        "import importlib, torch\n"
        f"for name in {MODULES}:\n"
        "    importlib.import_module('kernels.' + name)\n"
        "from kernels.softmax import softmax, reference\n"
        "print(reference(torch.zeros(1, 2)).tolist())\n"
        "@kernels.jit\n"
        "def kernel(x, BLOCK: kernels.tl.constexpr): ...\n"
        "for call in (lambda: softmax(torch.zeros(1, 2)), lambda: kernel[(1,)](0)):\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    found = python(script)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.splitlines()
    assert "it exists for Linux" in lines[0] and "The references run" in lines[0]
    assert lines[1] == "[[0.5, 0.5]]"
    assert lines[2].startswith("softmax cannot run: Triton is not installed") and "kernel cannot run" in lines[3]


# --- modes

needs_interpreter = pytest.mark.skipif(not INTERPRET, reason="about the interpreter")


@needs_interpreter
def test_a_mode_that_is_switched_late_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="built for the interpreter and TRITON_INTERPRET now asks for the GPU"):
        check("softmax", x=torch.zeros(1))


@needs_interpreter
def test_triton_imported_first_is_refused_or_set():
    found = python("import triton, triton.language\nimport kernels")
    assert found.returncode and "import kernels before triton" in found.stderr
    found = python("import triton, triton.language\nimport kernels\nprint(kernels.INTERPRET)", TRITON_INTERPRET="1")
    assert found.stdout == "True\n", found.stderr


@pytest.mark.parametrize(
    "given, message",
    [
        ({"x": [1.0]}, "x must be a tensor, it is a list"),
        ({"x": torch.zeros(1, dtype=torch.int32)}, "x is int32; it must be float32, float16"),
        ({"x": torch.zeros(1, device="meta")}, "x is on meta"),
    ],
)
def test_check_names_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=f"f: {message}"):
        check("f", **given)


def test_check_wants_one_dtype(device):
    with pytest.raises(ValueError, match=r"y is torch.float16 .* and x is torch.float32"):
        check("f", x=torch.zeros(1, device=device), y=torch.zeros(1, device=device, dtype=torch.float16), z=None)


def test_precision_and_dtypes():
    assert accumulator(torch.float64) == tl.float64 and accumulator(torch.bfloat16) == tl.float32
    assert (
        operand(torch.bfloat16) == (tl.float32 if INTERPRET else tl.bfloat16) and operand(torch.float16) == tl.float16
    )
    assert precision(torch.float16) == "ieee" and precision(torch.float32) in ("ieee", "tf32")


# --- guarded memory


@jit
def _shift(x, out, size, by, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + by, at < size), at < size)


@jit
def _add_at(x, place, BLOCK: tl.constexpr):
    tl.atomic_add(x + place + tl.arange(0, BLOCK), 1.0)


@needs_interpreter
@pytest.mark.parametrize("by, where", [(1, "1 elements behind"), (-2, "2 elements before"), (10**6, "behind")])
def test_an_address_outside_is_found(by, where):
    x = torch.arange(8.0)
    _shift[(1,)](x, torch.zeros(8), 8, 0, BLOCK=8)
    with pytest.raises(IndexError, match=f"_shift: load of .* ({where}|elements (before|behind)) one"):
        _shift[(1,)](x, torch.zeros(8), 8, by, BLOCK=8)
    with pytest.raises(IndexError, match="_shift: store"):
        _shift[(1,)](x, torch.zeros(6), 8, 0, BLOCK=8)
    with pytest.raises(IndexError, match="atomic"):
        _add_at[(1,)](x, 1, BLOCK=8)
    _add_at[(1,)](x, 0, BLOCK=8)


@needs_interpreter
def test_a_view_covers_only_itself():
    whole = torch.arange(16.0)
    with pytest.raises(IndexError):
        _shift[(1,)](whole[4:12], torch.zeros(8), 8, 2, BLOCK=8)
    out = torch.zeros(8)
    _shift[(1,)](whole[4:12], out, 8, 0, BLOCK=8)
    assert torch.equal(out, whole[4:12])


def test_results_start_as_nan_only_when_guarded():
    assert empty((3,), like=torch.zeros(1)).isnan().all()
    assert (empty((3,), like=torch.zeros(1), dtype=torch.int32) == -1).all()
    with guarded():  # inside another guard
        assert empty((3,), like=torch.zeros(1)).isnan().all()


def test_the_guard_leaves_nothing_behind():
    from triton.runtime import interpreter

    before = interpreter.InterpreterBuilder.create_masked_load
    found = python(
        "import kernels, torch\nfrom triton.runtime import interpreter as i\n"
        "before = i.InterpreterBuilder.create_masked_load, i.GridExecutor.__call__\n"
        "try:\n    with kernels.guarded():\n        raise KeyError\nexcept KeyError: pass\n"
        "print(before == (i.InterpreterBuilder.create_masked_load, i.GridExecutor.__call__))"
    )
    assert found.stdout == "True\n" and before is not None


def test_device_is_where_tensors_go():
    assert DEVICE in ("cpu", "cuda") and HAS_TRITON and (DEVICE == "cpu") == INTERPRET
    assert set(kernels.__all__) <= set(dir(kernels))


# --- other GPUs


@pytest.mark.parametrize(
    "arch, allowed",
    [(("cuda", 75), "ieee"), (("cuda", 80), "tf32"), (("hip", "gfx90a"), "ieee"), (("hip", "gfx942"), "tf32")],
)
def test_fast_float32_only_where_the_gpu_has_it(arch, allowed, monkeypatch):
    """On gfx90a "high" precision was an error of the compiler that a search does not survive."""
    monkeypatch.setattr("kernels._runtime.capability", lambda index=None: arch)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert precision(torch.float32) == "ieee" and precision(torch.float16) == "ieee"


def test_bfloat16_is_refused_where_the_gpu_has_none(monkeypatch, device):
    x = torch.zeros(2, dtype=torch.bfloat16, device=device)
    check("f", x=x)
    monkeypatch.setattr("kernels._runtime.capability", lambda index=None: ("cuda", 75))
    with pytest.raises(ValueError, match="x is bfloat16, which needs compute capability 8.0, and this GPU has 7.5"):
        check("f", x=x)
    check("f", x=x.half())
    monkeypatch.setattr("kernels._runtime.capability", lambda index=None: ("hip", "gfx90a"))
    check("f", x=x)


def test_configurations_are_pruned_by_the_shared_memory_of_the_gpu(monkeypatch):
    sizes = [100_000, 60_000, 200_000]
    for limit, left in [(232_448, sizes), (101_376, sizes[:2]), (65_536, [60_000]), (1_000, [60_000])]:
        monkeypatch.setattr("kernels._runtime.limits", lambda index=None, limit=limit: (limit, 1, None))
        assert in_shared(sizes, torch.zeros(1), lambda size: size) == left

"""What the kernel tests share: guarded memory, broken copies of a kernel, and the rule that says how exact is exact."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import kernels

FOLDER = Path(kernels.__file__).parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pytest_collection_modifyitems(items):
    if kernels.HAS_TRITON:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "without_triton" not in item.name:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed here; it exists for Linux"))


@pytest.fixture(autouse=True)
def guard():
    """Every test runs with guarded addresses and with results that start as NaN."""
    with kernels.guarded():
        yield


@pytest.fixture
def device():
    return torch.device(kernels.DEVICE)


@pytest.fixture
def mutant(tmp_path):
    """mutant("softmax", "old text", "new text"): the module kernels/softmax.py with one thing changed, imported.

    The old text must occur exactly once, so that a mutation cannot miss what it means to break.
    """
    names = []

    def build(name, old, new):
        source = (FOLDER / f"{name}.py").read_text()
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in kernels/{name}.py"
        path = tmp_path / f"{name}_mutant_{len(names)}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(f"kernels.{path.stem}", path)  # it imports its neighbors
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        names.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield build
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def gradcheck():
    """torch.autograd.gradcheck in float64. In the interpreter only: on a GPU float64 products are not our business."""
    if not kernels.INTERPRET:
        pytest.skip("float64 gradient checks run in the interpreter")

    def run(function, *inputs, **options):
        return torch.autograd.gradcheck(function, inputs, **{"eps": 1e-6, "atol": 1e-6, "rtol": 1e-5, **options})

    return run


@pytest.fixture
def as_exact_as_torch():
    """as_exact_as_torch(kernel, reference, *inputs, wrt=(0, 1)): error at most twice that of torch, both ways.

    Both errors are taken against `reference` in float64. `reference` runs in the inputs' own dtype for the error of
    torch. The random gradient of the output is shared. wrt: the positions of the inputs to differentiate by.

    Two correct ways to add m numbers differ by about sqrt(m) roundings of the largest result, and which of them torch
    is close to depends on the processor. So that much is always allowed: m is the longest axis of the inputs, and the
    rounding is that of the accumulator, float32 or better, with two roundings of the results' own type on top.
    """

    def run(kernel, reference, *inputs, wrt=(), factor=2.0):
        def evaluate(function, dtype):
            args = [x.detach().to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
            leaves = [args[i].requires_grad_() for i in wrt]
            out = function(*args)
            if not leaves:
                return [out.double()]
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            grads = torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))
            return [out.detach().double(), *(g.double() for g in grads)]

        dtype = next(x.dtype for x in inputs if torch.is_tensor(x) and x.is_floating_point())
        terms = max(max(x.shape, default=1) for x in inputs if torch.is_tensor(x))
        accumulator = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        roundings = 2 * torch.finfo(dtype).eps + terms**0.5 * accumulator
        exact, ours, theirs = evaluate(reference, torch.float64), evaluate(kernel, dtype), evaluate(reference, dtype)
        for place, (want, got, peer) in enumerate(zip(exact, ours, theirs, strict=True)):
            name = "the output" if place == 0 else f"the gradient by input {wrt[place - 1]}"
            assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            assert got.isfinite().equal(want.isfinite()), f"{name} is not finite where it should be"
            error = (got - want).abs().max()
            allowed = factor * (peer - want).abs().max() + roundings * want.abs().max()
            assert error <= allowed, f"{name} is off by {error:.2e}; torch in {dtype} allows {allowed:.2e}"

    return run

"""rms_norm: both kernels, forward and backward, alone and with a residual, and broken copies that must be caught."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels.rms_norm as module
from kernels import INTERPRET
from kernels.rms_norm import RMSNorm, reference, rms_norm

SHAPES = [(7, 1), (1, 7), (65, 63), (3, 130), (2, 3, 65), (4, 1000)]


def make(shape, device, dtype=torch.float32, seed=0):
    """x with a mean far from 0, weight, eps and a residual."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *s: torch.randn(s, generator=g).to(device, dtype)
    return random(*shape) + 3, random(shape[-1]), 1e-5, random(*shape)


def joined(function):
    """The two results of the form with a residual as one tensor, for fixtures that expect one."""
    return lambda *args: torch.stack(function(*args))


@pytest.fixture
def long(monkeypatch):
    """Every row is longer than a block: the kernels that loop over a row, in the interpreter with blocks of 64."""
    monkeypatch.setattr(module, "LONGEST", 0)
    monkeypatch.setattr(module, "LONGEST_BACKWARD", 0)
    if INTERPRET:
        for kernel in (module._forward_long, module._backward_long):
            monkeypatch.setitem(kernel.configs[0].kwargs, "BLOCK", 64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_pass(shape, device, as_exact_as_torch):
    # 3 and not 2: in a handful of numbers the largest of torch's errors may be a lucky one
    as_exact_as_torch(rms_norm, reference, *make(shape, device)[:3], wrt=(0, 1), factor=3.0)


@pytest.mark.parametrize("shape", [(3, 63), (65, 64), (2, 130)], ids=str)
def test_long_rows(shape, device, as_exact_as_torch, long):
    as_exact_as_torch(rms_norm, reference, *make(shape, device)[:3], wrt=(0, 1), factor=3.0)


def test_rows_beyond_the_limits(device, as_exact_as_torch):
    columns = max(module.LONGEST, module.LONGEST_BACKWARD) + 17
    as_exact_as_torch(joined(rms_norm), joined(reference), *make((2, columns), device), wrt=(0, 1, 3))


@pytest.mark.parametrize("shape", [(5, 63), (2, 3, 130)], ids=str)
@pytest.mark.parametrize("size", ["short", "long"])
def test_residual(shape, size, device, as_exact_as_torch, request):
    if size == "long":
        request.getfixturevalue("long")
    as_exact_as_torch(joined(rms_norm), joined(reference), *make(shape, device), wrt=(0, 1, 3), factor=3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["short", "long"])
def test_half_precision(dtype, size, device, as_exact_as_torch, request):
    if size == "long":
        request.getfixturevalue("long")
    plain = lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)
    as_exact_as_torch(rms_norm, plain, *make((5, 130), device, dtype)[:3], wrt=(0, 1))
    as_exact_as_torch(joined(rms_norm), joined(reference), *make((5, 130), device, dtype), wrt=(0, 1, 3))


@pytest.mark.parametrize("size", ["short", "long"])
def test_without_weight(size, device, request):
    if size == "long":
        request.getfixturevalue("long")
    x, _, eps, r = make((3, 70), device)
    x.requires_grad_()
    found, wanted = rms_norm(x, None, eps), F.rms_norm(x, (70,), None, eps)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, r)[0] for y in (found, wanted)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_default_eps_is_that_of_torch(dtype, device):
    """Rows so small that eps decides."""
    x = make((3, 64), device, dtype)[0] / 2**12
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (64,)), atol=2e-3, rtol=2e-3)


def test_only_one_of_two_results_is_used(device):
    x, w, eps, r = make((3, 10), device)
    x.requires_grad_(), r.requires_grad_()
    for place in (0, 1):
        found, wanted = (
            torch.autograd.grad(f(x, w, eps, r)[place].square().sum(), (x, r)) for f in (rms_norm, reference)
        )
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_residual_alone_needs_a_gradient(device):
    x, w, eps, r = make((3, 10), device)
    r.requires_grad_()
    found, wanted = (torch.autograd.grad(f(x, w, eps, r)[0][:, 0].sum(), r)[0] for f in (rms_norm, reference))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_several_programs_and_partial_sums(device, monkeypatch):
    monkeypatch.setattr("kernels._rows.TILE", 128)  # 2 rows in a tile, 3 programs: the first has 3 tiles, the last 2
    x, w, eps, r = make((15, 50), device)
    w.requires_grad_()
    found, wanted = rms_norm(x, w, eps), F.rms_norm(x, (50,), w, eps)
    torch.testing.assert_close(*(torch.autograd.grad(y, w, r)[0] for y in (found, wanted)), atol=1e-5, rtol=1e-4)


def test_the_same_bits_every_time(device):
    x, w, eps, r = make((65, 70), device)
    w.requires_grad_()
    first, second = (torch.autograd.grad(rms_norm(x, w), w, r)[0] for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("size", ["short", "long"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(size, residual, gradcheck, request):
    if size == "long":
        request.getfixturevalue("long")
    shape = (2, 66) if size == "long" and not residual else (3, 5)
    x, w, eps, r = (t.requires_grad_() if torch.is_tensor(t) else t for t in make(shape, "cpu", torch.float64))
    assert gradcheck(rms_norm, x, w, eps, *((r,) if residual else ()), fast_mode=size == "long")


@pytest.mark.parametrize("view", ["transposed", "every second", "a slice", "expanded", "four dimensions"])
def test_any_strides(view, device):
    x = make((6, 10), device)[0]
    x = {
        "transposed": x.T,
        "every second": x[:, ::2],
        "a slice": x[1:, 2:9],
        "expanded": x[:1].expand(4, 10),
        "four dimensions": make((2, 30, 4, 5), device)[0].permute(2, 0, 3, 1),
    }[view].detach().requires_grad_()
    grad = make(x.shape, device, seed=1)[0].transpose(0, 1).contiguous().transpose(0, 1)
    found, wanted = rms_norm(x), F.rms_norm(x, x.shape[-1:])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, wanted)), atol=1e-5, rtol=1e-4)
    y, total = rms_norm(x, residual=x)
    torch.testing.assert_close(total, x + x)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    y, total = rms_norm(x, residual=x)
    assert y.shape == total.shape == rms_norm(x).shape == shape
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_module(options, device):
    x, w, _, r = make((2, 3, 12), device)
    theirs, ours = nn.RMSNorm(12, **options).to(device), RMSNorm(12, **options).to(device)
    for p, value in zip(theirs.parameters(), (w,), strict=False):
        p.data.copy_(value)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, r), (theirs(x + r), x + r))


def test_messages(device):
    x = torch.zeros(2, 6, device=device)
    with pytest.raises(ValueError, match=r"weight has shape \(5,\), and rows of x have 6"):
        rms_norm(x, torch.ones(5, device=device))
    with pytest.raises(ValueError, match=r"residual has shape \(6,\) and x \(2, 6\)"):
        rms_norm(x, residual=x[0])
    with pytest.raises(ValueError, match="residual is torch.float16"):
        rms_norm(x, residual=x.half())
    with pytest.raises(ValueError, match="weight is int32"):
        rms_norm(x, torch.ones(6, device=device, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"shape \(\)"):
        rms_norm(x[0, 0])
    with pytest.raises(ValueError, match=r"not \(3, 4\)"):
        RMSNorm((3, 4))


MUTANTS = {  # name: (the looping kernels?, old text, new text)
    "divided by the block": (False, "tl.sum(x * x, 1)[:, None] / n", "tl.sum(x * x, 1)[:, None] / BLOCK"),
    "no projection": (False, "(dn - normal * along) * rstd", "dn * rstd"),
    "centered, as in layer_norm": (
        False,
        "dx = (dn - normal * along) * rstd",
        "dx = (dn - tl.sum(dn, 1)[:, None] / n - normal * along) * rstd",
    ),
    "sums of one tile alone": (False, "dw += dy * normal", "dw = dy * normal"),
    "residual's gradient lost": (
        False,
        "dx += tl.load(DS + row * ds_stride + column, mask=inside",
        "dx += 0 * tl.load(DS + row * ds_stride + column, mask=inside",
    ),
    "squares of the last block alone": (True, "squares += x * x", "squares = x * x"),
    "no projection, long": (True, "(dn - s * rstd * mean)", "dn"),
    "column sums of the raw rows": (True, "to(ACC) * (s * rstd)", "to(ACC) * s"),
}


def agrees(candidate, looping, device):
    """Whether the module `candidate` gives values and gradients of 9 rows with a residual."""
    x, w, eps, r = (t.requires_grad_() if torch.is_tensor(t) else t for t in make((9, 150), device))
    grads = [make((9, 150), device, seed=s)[0] for s in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels._rows.TILE", 256)  # several tiles for each of several programs
        patch.setattr("kernels._rows.INTERPRET", True)  # 3 programs on a GPU too
        patch.setattr(candidate, "LONGEST", 0 if looping else 1024)
        patch.setattr(candidate, "LONGEST_BACKWARD", 0 if looping else 1024)
        if INTERPRET:
            for kernel in (candidate._forward_long, candidate._backward_long):
                patch.setitem(kernel.configs[0].kwargs, "BLOCK", 64)
        y = candidate.rms_norm(x, w, eps, r)
        found = [*y, *torch.autograd.grad(y, (x, w, r), grads)]
    y = reference(x, w, eps, r)
    wanted = [*y, *torch.autograd.grad(y, (x, w, r), grads)]
    return all(torch.allclose(f, t, atol=1e-4, rtol=1e-4) for f, t in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device, mutant):
    looping, old, new = MUTANTS[name]
    if looping and not INTERPRET:
        pytest.skip("on a GPU the blocks are tuned and a short row has one")
    assert agrees(module, looping, device)
    assert not agrees(mutant("rms_norm", old, new), looping, device)

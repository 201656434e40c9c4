"""softmax: both kernels, forward and backward, against plain torch; and broken copies that must be caught."""

import pytest
import torch
import torch.nn.functional as F

import kernels.softmax as module
from kernels import INTERPRET
from kernels.softmax import reference, softmax

SHAPES = [(1, 1), (7, 1), (1, 7), (65, 63), (3, 130), (2, 3, 65), (4, 1000)]


def rows(shape, device, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(device, dtype)


@pytest.fixture
def long(monkeypatch):
    """Every row is longer than a block: the kernels that loop over a row."""
    monkeypatch.setattr(module, "LONGEST", 0)
    monkeypatch.setattr(module, "LONGEST_BACKWARD", 0)


@pytest.fixture
def blocks(monkeypatch):
    """The looping kernels with blocks of 64 elements, so that a short row has several (interpreter only)."""
    if not INTERPRET:
        pytest.skip("on a GPU the blocks are tuned")
    for kernel in (module._forward_online, module._backward_long):
        monkeypatch.setitem(kernel.configs[0].kwargs, "BLOCK", 64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_pass(shape, device, as_exact_as_torch):
    # 3 and not 2: in a handful of numbers the largest of torch's errors may be a lucky one
    as_exact_as_torch(softmax, reference, rows(shape, device), wrt=(0,), factor=3.0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (2, 65), (2, 2, 130)], ids=str)
def test_online(shape, device, as_exact_as_torch, long, blocks):
    as_exact_as_torch(softmax, reference, rows(shape, device), wrt=(0,))


def test_rows_beyond_the_limits(device, as_exact_as_torch):
    columns = max(module.LONGEST, module.LONGEST_BACKWARD) + 17
    as_exact_as_torch(softmax, reference, rows((2, columns), device), wrt=(0,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [65, 33000])
def test_half_precision(dtype, columns, device, as_exact_as_torch):
    as_exact_as_torch(softmax, lambda x: F.softmax(x, -1), rows((3, columns), device, dtype), wrt=(0,))


def test_several_programs(device, monkeypatch):
    monkeypatch.setattr("kernels._rows.TILE", 128)  # 2 rows of 64 for a program, 3 programs, the last with one row
    x = rows((5, 50), device)
    torch.testing.assert_close(softmax(x), x.softmax(-1))


def test_gradcheck_one_pass(gradcheck):
    assert gradcheck(softmax, rows((3, 7), "cpu", torch.float64).requires_grad_())


def test_gradcheck_online(gradcheck, long, blocks):
    assert gradcheck(softmax, rows((1, 70), "cpu", torch.float64).requires_grad_())


@pytest.mark.parametrize("view", ["transposed", "every second", "a slice", "expanded", "four dimensions"])
def test_any_strides(view, device):
    x = rows((6, 10), device)
    x = {
        "transposed": x.T,
        "every second": x[:, ::2],
        "a slice": x[1:, 2:9],
        "expanded": x[:1].expand(4, 10),
        "four dimensions": rows((2, 3, 4, 5), device).permute(2, 0, 3, 1),
    }[view].detach().requires_grad_()
    weight = rows(x.T.shape, device, seed=1).T if x.dim() == 2 else rows(x.shape, device, seed=1)
    (found,) = torch.autograd.grad(softmax(x), x, weight)
    (wanted,) = torch.autograd.grad(x.softmax(-1), x, weight)
    torch.testing.assert_close(softmax(x), x.softmax(-1))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    softmax(x).sum().backward()
    assert softmax(x).shape == shape and x.grad.shape == shape


@pytest.mark.parametrize("online", [False, True])
def test_extreme_values(online, device, request):
    """Scores of +-1e4, rows that begin with -inf for more than a block, and a row of -inf alone."""
    if online:
        request.getfixturevalue("long"), request.getfixturevalue("blocks")
    x = rows((4, 150), device)
    x[0] *= 1e4
    x[1, :70] = -torch.inf
    x[2, 70:] = -torch.inf
    x[3] = -torch.inf
    torch.testing.assert_close(softmax(x), x.softmax(-1), equal_nan=True)
    assert softmax(x)[3].isnan().all() and softmax(x)[:3].isfinite().all()


@pytest.mark.parametrize("online", [False, True])
def test_rows_sum_to_one_and_a_shift_changes_nothing(online, device, request):
    if online:
        request.getfixturevalue("long"), request.getfixturevalue("blocks")
    x = rows((5, 200), device)
    torch.testing.assert_close(softmax(x).sum(-1), torch.ones(5, device=device))
    torch.testing.assert_close(softmax(x + 50), softmax(x), atol=1e-6, rtol=1e-4)


def test_messages(device):
    with pytest.raises(ValueError, match=r"shape \(\)"):
        softmax(torch.tensor(1.0, device=device))
    with pytest.raises(ValueError, match="x is int64"):
        softmax(torch.arange(3, device=device))
    with pytest.raises(ValueError, match="must be a tensor, it is a list"):
        softmax([1.0, 2.0])


MUTANTS = {  # name: is the looping kernel broken, old text, new text
    "no rescale": (True, "total * tl.exp(high - shift) + tl.sum", "total + tl.sum"),
    "the maximum of the block alone": (True, "higher = tl.maximum(high, tl.max(x, 0))", "higher = tl.max(x, 0)"),
    "long gradient without the sum": (True, "(y * (dy - dot))", "(y * dy)"),
    "padding has weight": (False, 'mask=column < n, other=float("-inf"))', "mask=column < n, other=0.0)"),
    "no maximum": (False, "tl.exp(x - tl.max(x, 1)[:, None])", "tl.exp(x)"),
    "gradient without the sum": (False, "(dy - tl.sum(y * dy, 1)[:, None])", "dy"),
    "first column of the gradient not written": (
        False,
        "dx.to(DX.dtype.element_ty), mask=inside)",
        "dx.to(DX.dtype.element_ty), mask=inside & (column > 0))",
    ),
    "a row too many": (False, "inside = (row < rows) & (column < n)\n    row =", "inside = column < n\n    row ="),
}


def agrees(candidate, looping, device):
    """Whether `candidate` is right on three rows: one rises, one falls, one lies far below zero."""
    x = rows((3, 150), device).sort(-1).values * 20
    x = torch.stack([x[0], x[1].flip(0), rows((150,), device) - 30]).requires_grad_()
    weight = rows((3, 150), device, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate, "LONGEST", 0 if looping else 1024)
        patch.setattr(candidate, "LONGEST_BACKWARD", 0 if looping else 1024)
        if INTERPRET:
            for kernel in (candidate._forward_online, candidate._backward_long):
                patch.setitem(kernel.configs[0].kwargs, "BLOCK", 64)
        y = candidate.softmax(x)
        (found,) = torch.autograd.grad(y, x, weight)
    wanted = x.softmax(-1)
    (gradient,) = torch.autograd.grad(wanted, x, weight)
    return torch.allclose(y, wanted, atol=1e-6) and torch.allclose(found, gradient, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in MUTANTS if n != "a row too many"])
def test_mutants_are_caught(name, device, mutant):
    looping, old, new = MUTANTS[name]
    if looping and not INTERPRET:
        pytest.skip("on a GPU the blocks are tuned and a short row has one")
    assert agrees(module, looping, device)
    assert not agrees(mutant("softmax", old, new), looping, device)


def test_a_write_behind_the_last_row_is_caught(device, mutant):
    if not INTERPRET:
        pytest.skip("addresses are guarded in the interpreter alone")
    _, old, new = MUTANTS["a row too many"]
    broken = mutant("softmax", old, new.replace("row =", "row = row + 0 *", 1))
    with pytest.raises(IndexError, match="outside every tensor"):
        broken.softmax(rows((3, 10), device))

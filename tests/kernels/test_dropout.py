"""dropout: the mask is exactly Philox's, the backward pass draws it again, and nothing is stored."""

import math

import pytest
import torch
from torch import nn

from kernels import INTERPRET, jit, tl
from kernels import dropout as module
from kernels.dropout import SLICES, Dropout, _philox, dropout, reference

SIZES = [1, 7, 16, 63, 65, 127, 129, 1000, 8 * 16384 + 8 * 16 + 5] + ([] if INTERPRET else [2**26 + 1])


def values(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@jit
def _words(out_ptr, seed, SIZE: tl.constexpr, ROUNDS: tl.constexpr):
    at = tl.arange(0, SIZE)
    words = tl.randint4x(seed, at, ROUNDS)
    for i in tl.static_range(4):
        tl.store(out_ptr + i * SIZE + at, words[i].to(tl.uint32, bitcast=True).to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1, 2**31, 2**40 + 17, 2**63 - 1])
def test_philox_in_torch_is_triton_s(seed, device):
    out = torch.empty(4, 64, dtype=torch.int64, device=device)
    _words[(1,)](out, seed, 64, module.ROUNDS)
    assert torch.equal(out, _philox(seed, torch.arange(64, device=device)))


def test_philox_is_the_paper_s(monkeypatch):
    """The known answer of Philox4x32-10 for counter 0 and key 0, published with its implementation."""
    monkeypatch.setattr(module, "ROUNDS", 10)
    words = _philox(0, torch.zeros(1, dtype=torch.int64))
    assert [f"{w:08x}" for w in words.flatten().tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference_at_odd_sizes(size, device):
    x = values(size, device=device)
    assert torch.equal(dropout(x, 0.3, 5), reference(x, 0.3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_as_exact_as_torch(dtype, device, as_exact_as_torch):
    as_exact_as_torch(dropout, reference, values(5, 77, device=device, dtype=dtype), 0.25, 3, wrt=(0,))


def test_gradcheck(gradcheck, device):
    x = values(2, 9, device=device, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: dropout(x, 0.4, 9), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.4, 9) ** 2, (x[:1, :3].detach().requires_grad_(),))


def test_backward_uses_the_mask_of_forward(device):
    x = torch.ones(4099, device=device, requires_grad=True)
    out = dropout(x, 0.5, 11)
    assert out.grad_fn.saved_tensors == ()
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert set(out.detach().unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_share_and_mean(p, device):
    size = 100_000
    out = dropout(torch.ones(size, device=device), p, 1)
    spread = math.sqrt(p * (1 - p) / size)
    assert abs((out == 0).double().mean().item() - p) <= 5 * spread
    if p < 1:
        assert abs(out.double().mean().item() - 1) <= 5 * spread / (1 - p) + 1e-5


def test_elements_and_seeds_are_independent(device):
    """No two slices, no neighbors, and no two seeds drop alike: correlations stay within five standard errors."""
    size = 80_000
    drop = lambda seed: (dropout(torch.ones(size, device=device), 0.5, seed) == 0).double() * 2 - 1
    a, b = drop(0), drop(1)
    slices = a[: size // SLICES * SLICES].view(SLICES, -1)
    for left, right in [(a, b), (a[1:], a[:-1]), *((slices[i], slices[j]) for i in range(8) for j in range(i))]:
        assert abs((left * right).mean().item()) < 5 / math.sqrt(left.numel())
    assert torch.equal(a, drop(0))


def test_the_mask_depends_on_neither_shape_nor_layout_nor_dtype(device):
    x = torch.ones(24, 35, device=device)
    flat = dropout(x.flatten(), 0.5, 2)
    assert torch.equal(dropout(x, 0.5, 2).flatten(), flat)
    assert torch.equal(dropout(torch.ones(35, 24, device=device).T, 0.5, 2).flatten(), flat)
    assert torch.equal(dropout(x.half(), 0.5, 2).flatten().float(), flat)
    assert torch.equal(dropout(torch.ones(1, device=device).expand(24, 35), 0.5, 2).flatten(), flat)


@pytest.mark.skipif(not INTERPRET, reason="sets the interpreter's block")
@pytest.mark.parametrize("block", [16, 64])
def test_the_mask_does_not_depend_on_the_block(block, mutant, device):
    other = mutant("dropout", 'interpret={"BLOCK": 16384}', f'interpret={{"BLOCK": {block}}}')
    x = values(1003, device=device)
    assert torch.equal(other.dropout(x, 0.5, 2), dropout(x, 0.5, 2))


def test_nothing_to_drop(device):
    x = torch.empty(0, 3, device=device, requires_grad=True)
    dropout(x, 0.5, 0).sum().backward()
    assert x.grad.shape == (0, 3)


def test_module_takes_the_place_of_torch_s(device):
    x, ours = torch.ones(40, 25, device=device), Dropout(0.5)
    assert isinstance(ours, nn.Dropout)
    torch.manual_seed(0)
    first, second = ours(x), ours(x)
    torch.manual_seed(0)
    assert torch.equal(ours(x), first) and not torch.equal(first, second)
    assert ours.eval()(x) is x
    with pytest.raises(ValueError, match="inplace=True"):
        Dropout(0.5, inplace=True)(x)


def test_errors_name_the_values(device):
    x = values(4, device=device)
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"{p}"):
            dropout(x, p, 0)
    for seed in (-1, 2**63, 0.5):
        with pytest.raises(ValueError, match=f"{seed}"):
            dropout(x, 0.5, seed)
    with pytest.raises(ValueError, match="int32"):
        dropout(x.int(), 0.5, 0)


MUTANTS = {
    "backward draws another mask": ("apply(grad, ctx.p, ctx.seed)", "apply(grad, ctx.p, ctx.seed + 1)"),
    "no scale": ("x * scale, 0.0", "x, 0.0"),
    "the mask upside down": (">= threshold, x", "< threshold, x"),
    "slices that run into each other": ("(at < length) & (at < size)", "at < size"),
    "a write behind the tensor": ("(at < length) & (at < size)", "at < length"),
    "all slices alike": ("words[s // 2]", "words[0]"),
    "fewer rounds": ("ROUNDS = 7", "ROUNDS = 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.skipif(not INTERPRET, reason="an access outside a tensor is undefined on a GPU")
def test_a_broken_kernel_is_found(name, mutant, device):
    old, new = MUTANTS[name]
    broken = mutant("dropout", old, new)

    def good(dropout):
        x = values(8 * 16384 + 133, device=device).requires_grad_()  # two programs
        try:
            out = dropout(x, 0.3, 5)
            (grad,) = torch.autograd.grad(out, x, torch.ones_like(x))
        except IndexError:  # raised by the guard around memory
            return False
        want = reference(x, 0.3, 5)
        return torch.equal(out, want) and torch.equal(grad, torch.autograd.grad(want.sum(), x)[0])

    assert good(dropout)
    assert not good(broken.dropout)

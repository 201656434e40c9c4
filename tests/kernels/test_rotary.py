"""rotary: both pairings against torch and chapter 03, any strides and tables, backward by minus the angle."""

import pytest
import torch

from kernels import INTERPRET
from kernels import rotary as module
from kernels.rotary import reference, rotary
from tfkit import measure
from tfkit.zoo import positions
from tfkit.zoo.attention import causal_attention

PAIRINGS = [pytest.param(False, id="halves"), pytest.param(True, id="pairs")]


def make(*shape, c, lead=(), device, dtype=torch.float32, tables=None):
    g = torch.Generator().manual_seed(sum(shape) + c)
    angle = 3 * torch.randn(*lead, shape[-2], c, generator=g, dtype=torch.float64)
    x = torch.randn(*shape, generator=g).to(device, dtype)
    return x, *(t.to(device, tables or dtype) for t in (angle.cos(), angle.sin()))


@pytest.mark.parametrize("pairs", PAIRINGS)
@pytest.mark.parametrize(
    "shape, c",
    [((1, 2), 1), ((7, 6), 3), ((2, 63, 14), 7), ((2, 3, 65, 16), 8), ((1, 9, 5, 20), 4), ((2, 2, 3, 130, 6), 2)],
)
def test_equals_torch(shape, c, pairs, device, as_exact_as_torch):
    as_exact_as_torch(rotary, reference, *make(*shape, c=c, device=device), pairs, wrt=(0,))


@pytest.mark.parametrize("pairs", PAIRINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_exact_as_torch(dtype, pairs, device, as_exact_as_torch):
    as_exact_as_torch(rotary, reference, *make(2, 3, 33, 16, c=8, device=device, dtype=dtype), pairs, wrt=(0,))


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_exact_tables_are_used_as_they_are(pairs, device):
    """float32 tables with bfloat16 features: only the result is rounded."""
    x, cos, sin = make(2, 40, 16, c=8, device=device, dtype=torch.bfloat16, tables=torch.float32)
    out, exact = rotary(x, cos, sin, pairs), reference(x.double(), cos, sin, pairs)
    unit = torch.finfo(torch.bfloat16).eps
    assert out.dtype == torch.bfloat16 and ((out - exact).abs() <= unit * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_gradcheck(pairs, gradcheck, device):
    x, cos, sin = make(3, 2, 5, c=2, device=device, dtype=torch.float64)
    assert gradcheck(lambda x: rotary(x, cos, sin, pairs), x.requires_grad_())
    for lead in ((), (2, 1), (1, 2)):
        inputs = [t.requires_grad_() for t in make(2, 2, 2, 5, c=2, lead=lead, device=device, dtype=torch.float64)]
        assert gradcheck(lambda *inputs: rotary(*inputs, pairs), *inputs, fast_mode=True)


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_backward_turns_back(pairs, device):
    x, cos, sin = make(3, 10, 8, c=3, device=device)
    (grad,) = torch.autograd.grad(rotary(x.requires_grad_(), cos, sin, pairs), x, rotary(x, cos, sin, pairs).detach())
    assert torch.allclose(grad, x, atol=1e-5)


@pytest.mark.parametrize("pairs", PAIRINGS)
@pytest.mark.parametrize("lead", [(), (1,), (9,), (2, 1), (1, 9), (2, 9)])
def test_tables_are_broadcast(lead, pairs, device):
    x, cos, sin = make(2, 9, 5, 12, c=6, lead=lead, device=device)
    assert torch.allclose(rotary(x, cos, sin, pairs), reference(x, cos, sin, pairs), atol=1e-6)


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_any_strides(pairs, device):
    base, cos, sin = make(4, 6, 8, 10, c=4, device=device)
    views = {
        "heads split from a projection": base.transpose(1, 2),
        "every second feature": base.repeat_interleave(2, -1)[..., ::2],
        "features first": base.transpose(-1, -2).contiguous().transpose(-1, -2),
        "a slice": base[1:, 2:, :, :9],
        "expanded": base[:1, :1].expand(4, 6, 8, 10),
    }
    for name, x in views.items():
        table = [t[:6] if x.shape[-2] == 6 else t for t in (cos, sin)]
        assert torch.allclose(rotary(x, *table, pairs), reference(x, *table, pairs), atol=1e-6), name
    columns = [t.T.contiguous().T for t in (cos, sin)]
    x = base.clone().requires_grad_()
    out = rotary(x, *columns, pairs)
    (grad,) = torch.autograd.grad(out, x, base.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.allclose(grad, reference(base, cos, -sin, pairs), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 2, 5, 8), (2, 0, 5, 8)])
def test_nothing_to_turn(shape, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    cos = torch.empty(shape[-2], shape[-1] // 2, device=device)
    rotary(x, cos, cos).sum().backward()
    assert x.grad.shape == shape


def test_no_plane_at_all(device):
    x = torch.randn(2, 3, 5, device=device)
    assert torch.equal(rotary(x, x[0, :, :0], x[0, :, :0]), x)


def test_x_is_not_kept(device):
    x, cos, sin = make(2, 4, 32, 16, c=8, device=device)
    assert measure.saved_bytes(lambda x: rotary(x, cos, sin), x.requires_grad_()) == cos.nbytes + sin.nbytes


@pytest.mark.parametrize("name", ["rotate_halves", "rotate_pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fits_the_slot_of_the_zoo(name, dtype, device):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=g).to(device, dtype).requires_grad_() for n in (5, 9, 9))
    build = lambda home: positions.Rotary(16, causal_attention, rotate=getattr(home, name)).to(device)
    ours, theirs = build(module), build(positions)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    found, wanted = ours(q, k, v), theirs(q, k, v)
    assert torch.allclose(found, wanted, atol=tolerance)
    grads = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (found, wanted)]
    assert all(torch.allclose(a, b, atol=10 * tolerance) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["rotate_halves", "rotate_pairs"])
def test_learned_angles_get_the_zoo_s_gradient(name, device):
    x, angle = torch.randn(2, 3, 5, 8, device=device), torch.randn(3, 5, 4, device=device, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(getattr(home, name)(x, angle).square()[..., :3].sum(), angle)[0]
        for home in (module, positions)
    )
    assert torch.allclose(found, wanted, atol=1e-5)


def test_errors_name_the_values(device):
    x, cos, sin = make(2, 3, 5, 8, c=4, device=device)
    with pytest.raises(ValueError, match=r"\(5, 4\) and sin \(5, 3\)"):
        rotary(x, cos, sin[:, :3])
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 6\) and \(5, 4\)"):
        rotary(x[..., :6], cos, sin)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 8\) and \(5, 4\)"):
        rotary(x[:, :, 1:], cos, sin)
    with pytest.raises(ValueError, match=r"\(2, 1, 5, 4\) do not broadcast to x \(3, 3, 5, 8\)"):
        rotary(x[:1].expand(3, 3, 5, 8), *(t.expand(2, 1, 5, 4) for t in (cos, sin)))
    with pytest.raises(ValueError, match="int64"):
        rotary(x.long(), cos, sin)
    with pytest.raises(ValueError, match="float16"):
        rotary(x, cos, sin.half())


MUTANTS = {
    "backward turns forward": ("turn = -sin if BACK else sin", "turn = sin"),
    "a sign in the rotation": ("(a * turn + b * cos).to", "(a * turn - b * cos).to"),
    "a sign in the pairs": ("tl.join(a * cos - b * turn", "tl.join(a * cos + b * turn"),
    "a head too many at the end": ("tl.where(head + i < heads, tokens - start, 0)", "tokens - start"),
    "tokens not masked": ("< heads, tokens - start, 0)", "< heads, tokens - start + 1, 0)"),
    "the rest left out": ("REST=rest", "REST=0"),
    "one table for all heads": ("SHARED=cos.stride(1) == sin.stride(1) == 0 or heads == 1", "SHARED=True"),
    "the tables' strides exchanged": ("row * cos_n + plane * cos_c", "row * cos_c + plane * cos_n"),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.skipif(not INTERPRET, reason="an access outside a tensor is undefined on a GPU")
def test_a_broken_kernel_is_found(name, mutant, device):
    broken = mutant("rotary", *MUTANTS[name])

    def good(rotary):
        x, cos, sin = make(2, 9, 5, 12, c=4, lead=(9,), device=device)
        for pairs in (False, True):
            leaf = x.clone().requires_grad_()
            try:
                out = rotary(leaf, cos, sin, pairs)
                (grad,) = torch.autograd.grad(out, leaf, x)
            except IndexError:  # raised by the guard around memory
                return False
            want = reference(x, cos, sin, pairs), reference(x, cos, -sin, pairs)
            if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip((out, grad), want, strict=True)):
                return False
        return True

    assert good(rotary)
    assert not good(broken.rotary)


@pytest.mark.parametrize("pairs", [False, True])
def test_strides_beyond_32_bits(pairs, tmp_path, device):
    """Features 2^30 elements apart: an offset of 3 strides does not fit 32 bits. The file is almost all holes."""
    if not INTERPRET:
        pytest.skip("a file stands in for memory, and a GPU cannot read it")
    step = 2**30
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * step + 2, dtype=torch.float16)
    x = memory.as_strided((1, 4), (1, step))
    x.copy_(torch.randn(1, 4))
    angle = torch.randn(1, 2)
    got = rotary(x, angle.cos(), angle.sin(), pairs)
    torch.testing.assert_close(got, reference(x.clone(), angle.cos(), angle.sin(), pairs).half(), atol=1e-3, rtol=1e-3)

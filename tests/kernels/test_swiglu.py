"""swiglu: forward and backward against torch, rows that lie apart, and the module in chapter 07's slot."""

import pytest
import torch
from torch import nn

from kernels import INTERPRET
from kernels import swiglu as module
from kernels.swiglu import SwiGLU, reference, swiglu
from tfkit import measure
from tfkit.zoo.feedforward import GatedFeedForward
from tfkit.zoo.transformer import language_model


def pair(*shape, device, dtype=torch.float32, size=2.0):
    g = torch.Generator().manual_seed(sum(shape))
    return (size * torch.randn(2, *shape, generator=g)).to(device, dtype).unbind(0)


@pytest.mark.parametrize("shape", [(1,), (7,), (63, 65), (2, 3, 130), (5, 16385)])
def test_equals_torch_at_odd_sizes(shape, device, as_exact_as_torch):
    as_exact_as_torch(swiglu, reference, *pair(*shape, device=device), wrt=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_exact_as_torch(dtype, device, as_exact_as_torch):
    as_exact_as_torch(swiglu, reference, *pair(9, 200, device=device, dtype=dtype), wrt=(0, 1))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # exp(1e4) is inf, and 1 / (1 + inf) is 0
def test_extreme_gates_stay_finite(device):
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=device, requires_grad=True)
    up = torch.ones_like(gate)
    out = swiglu(gate, up)
    (grad,) = torch.autograd.grad(out.sum(), gate)
    assert torch.allclose(out, reference(gate, up))
    assert torch.allclose(grad, torch.tensor([0, 0, 0, 0.5, 1, 1, 1], device=device), atol=1e-6)


def test_gradcheck(gradcheck, device):
    inputs = [x.requires_grad_() for x in pair(2, 6, device=device, dtype=torch.float64)]
    assert gradcheck(swiglu, *inputs)
    whole = torch.cat(pair(3, 2, device=device, dtype=torch.float64), -1).requires_grad_()
    assert gradcheck(lambda x: swiglu(*x.chunk(2, -1)), whole)


def layouts(device):
    x, y = pair(12, 36, device=device)
    wide = torch.cat([x, y], -1)
    yield "halves of one projection", wide.chunk(2, -1)
    yield "transposed", (x.T, y.T)
    yield "every second column", (x[:, ::2], y[:, ::2])
    yield "one of each", (x, wide[:, 36:])
    yield "repeated rows", (x[:1].expand(12, 36), y)
    yield "four dimensions", tuple(t.view(3, 4, 2, 18).transpose(1, 2) for t in (x, y))


@pytest.mark.parametrize("case", range(6))
def test_any_layout(case, device, as_exact_as_torch):
    _, (gate, up) = list(layouts(device))[case]
    assert torch.allclose(swiglu(gate, up), reference(gate, up), atol=1e-6)
    weight = torch.randn(gate.shape[::-1], device=device).permute(*reversed(range(gate.dim())))
    found, wanted = (
        torch.autograd.grad(f(*leaves), leaves, weight)
        for f in (swiglu, reference)
        for leaves in [[x.detach().requires_grad_() for x in (gate, up)]]
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_halves_are_not_copied(device):
    wide = torch.randn(6, 8, device=device)
    halves = wide.chunk(2, -1)
    assert [r.data_ptr() for r in module._rows(*halves)] == [h.data_ptr() for h in halves]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_nothing_to_do(shape, device):
    gate = torch.empty(shape, device=device, requires_grad=True)
    swiglu(gate, gate).sum().backward()
    assert gate.grad.shape == shape


def test_a_scalar(device):
    gate, up = torch.tensor(1.5, device=device), torch.tensor(-2.0, device=device)
    assert torch.allclose(swiglu(gate, up), reference(gate, up))


def test_no_activation_is_kept(device):
    gate, up = (x.requires_grad_() for x in pair(16, 32, device=device))
    assert measure.saved_bytes(swiglu, gate, up) == 0
    assert measure.saved_bytes(reference, gate, up) == 16 * 32 * 4


def test_module_takes_the_place_of_the_zoo_s(device):
    torch.manual_seed(0)
    theirs, ours = GatedFeedForward(24).to(device), SwiGLU(24).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 24, device=device)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    for m in (ours, theirs):
        m(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    assert not any(isinstance(m, nn.SiLU) for m in ours.modules())


def test_module_fits_the_language_model(device):
    torch.manual_seed(0)
    build = lambda make: language_model(11, 16, 1, feedforward=lambda: make(16, 32)).to(device)
    ours, theirs = build(SwiGLU), build(GatedFeedForward)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(11, (2, 6), device=device)
    assert torch.allclose(ours(ids), theirs(ids), atol=1e-5)


def test_errors_name_the_values(device):
    gate, up = pair(3, 4, device=device)
    with pytest.raises(ValueError, match=r"\(3, 4\) and up \(4, 3\)"):
        swiglu(gate, up.T)
    with pytest.raises(ValueError, match="float16"):
        swiglu(gate, up.half())
    with pytest.raises(ValueError, match="int32"):
        swiglu(gate.int(), up.int())


MUTANTS = {
    "no mask at a store": ("(grad_up_ptr.dtype.element_ty), mask=mask)", "(grad_up_ptr.dtype.element_ty))"),
    "the gate's own slope forgotten": ("share * (1 + gate * (1 - share))", "share"),
    "a sign in the slope": ("(1 + gate * (1 - share))", "(1 - gate * (1 - share))"),
    "gradients exchanged": ("grad_up = grad * gate * share", "grad_up = grad * up * share"),
    "rows of up read with the gate's stride": ("(0), up.stride(0)", "(0), gate.stride(0)"),
    "a sigmoid in place of silu": ("out = gate * tl.sigmoid(gate) * up", "out = tl.sigmoid(gate) * up"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.skipif(not INTERPRET, reason="an access outside a tensor is undefined on a GPU")
def test_a_broken_kernel_is_found(name, mutant, device):
    broken = mutant("swiglu", *MUTANTS[name])
    gate, wide = pair(6, 40, device=device)

    def good(swiglu):
        inputs = [gate[:, :20].clone().requires_grad_(), wide.clone().requires_grad_()]
        try:
            out = swiglu(inputs[0], inputs[1][:, 20:])
            grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        except IndexError:  # raised by the guard around memory
            return False
        want = reference(inputs[0], inputs[1][:, 20:])
        wanted = torch.autograd.grad(want.sum(), inputs)
        return all(torch.allclose(a, b, atol=1e-5) for a, b in zip([out, *grads], [want, *wanted], strict=True))

    assert good(swiglu)
    assert not good(broken.swiglu)

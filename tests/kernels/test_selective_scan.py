"""The selective scan against the loop over tokens."""

import pytest
import torch

from kernels import INTERPRET
from kernels.selective_scan import benchmarks, materialized, reference, selective_scan

SIZES = [(1, 1, 1, 1), (2, 7, 2, 2), (1, 8, 3, 2), (1, 17, 2, 3)]  # batch, tokens, channels, states
SIZES += [] if INTERPRET else [(2, 1000, 70, 16), (1, 513, 64, 64)]
NAMES = ("x", "delta", "a", "b", "c", "d", "state")


def make(device, batch, n, channels, states, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    delta = torch.rand(batch, n, channels, generator=generator)
    a = -3 * torch.rand(channels, states, generator=generator)
    inputs = normal(batch, n, channels), delta, a, normal(batch, n, states), normal(batch, n, states)
    return [t.to(device, dtype) for t in (*inputs, normal(channels), normal(batch, channels, states))]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_loop_forward_and_backward(device, as_exact_as_torch, size):
    inputs = make(device, *size)
    as_exact_as_torch(selective_scan, reference, *inputs, wrt=range(7))
    as_exact_as_torch(selective_scan, reference, *inputs[:5], wrt=range(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, as_exact_as_torch, dtype):
    as_exact_as_torch(selective_scan, reference, *make(device, 1, 11, 2, 2, dtype), wrt=range(7))


def test_parameters_may_stay_in_float32(device):
    x, delta, a, b, c, d, _ = make(device, 1, 5, 2, 2)
    a, d = a.requires_grad_(), d.requires_grad_()
    half = [t.to(torch.float16) for t in (x, delta, b, c)]
    y = selective_scan(half[0], half[1], a, half[2], half[3], d)
    assert y.dtype == torch.float16
    grads = torch.autograd.grad(y.float().sum(), (a, d))
    assert all(g.dtype == torch.float32 for g in grads)
    torch.testing.assert_close(y.float(), reference(x, delta, a, b, c, d), rtol=1e-2, atol=1e-2)


def test_gradients_in_double_precision(device, gradcheck):
    inputs = [t.requires_grad_() for t in make(device, 1, 3, 1, 2, torch.float64)]
    gradcheck(lambda *given: selective_scan(*given, True), *inputs)


def test_gradients_across_chunks_in_double_precision(device, gradcheck):
    x, delta, a, b, c, d, _ = make(device, 1, 18, 1, 1, torch.float64)
    first = x[:, :1].clone().requires_grad_()
    gradcheck(lambda t: selective_scan(torch.cat([t, x[:, 1:]], 1), delta, a, b, c, d), first)
    first = delta[:, :1].clone().requires_grad_()
    gradcheck(lambda t: selective_scan(x, torch.cat([t, delta[:, 1:]], 1), a, b, c, d), first)


def test_strong_decay_keeps_the_small_gradient(device):
    """exp(delta a) is about 1e-7: what a state keeps must not drown in what it receives."""
    x, delta, a, b, c, *_ = make(device, 1, 12, 2, 2)
    delta, a = torch.full_like(delta, 4.0), torch.full_like(a, -4.0).requires_grad_()
    (ours,) = torch.autograd.grad(selective_scan(x, delta, a, b, c).sum(), a)
    exact = a.detach().double().requires_grad_()
    others = [t.double() for t in (x, delta, b, c)]
    (want,) = torch.autograd.grad(reference(others[0], others[1], exact, *others[2:]).sum(), exact)
    torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=0)


def test_equals_the_materialized_form(device):
    inputs = make(device, 2, 13, 2, 3)[:6]
    torch.testing.assert_close(selective_scan(*inputs), materialized(*inputs))


def test_segments_chain(device):
    x, delta, a, b, c, d, first = make(device, 1, 20, 2, 2)
    whole, end = selective_scan(x, delta, a, b, c, d, first, True)
    parts, state = [], first
    for cut in (slice(0, 9), slice(9, 20)):
        y, state = selective_scan(x[:, cut], delta[:, cut], a, b[:, cut], c[:, cut], d, state, True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, end)


def test_strided_inputs(device):
    inputs = make(device, 2, 9, 3, 2)
    turn = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 3 else t
    leaves = [turn(t).detach().requires_grad_() for t in inputs[:5]]
    plain = [t.detach().requires_grad_() for t in inputs[:5]]
    out, want = selective_scan(*leaves), reference(*plain)
    torch.testing.assert_close(out, want)
    ones = torch.ones_like(out[:, :1]).expand_as(out)  # a gradient without memory of its own
    torch.testing.assert_close(torch.autograd.grad(out, leaves, ones), torch.autograd.grad(want.sum(), plain))


@pytest.mark.parametrize("size", [(0, 3, 2, 2), (1, 0, 2, 2), (1, 3, 0, 2), (1, 3, 2, 0)])
def test_empty(device, size):
    batch, n, channels, states = size
    y, state = selective_scan(*make(device, *size), return_state=True)
    assert y.shape == (batch, n, channels) and state.shape == (batch, channels, states)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("delta", (1, 4, 2), r"\(1, 4, 2\)"),
        ("x", (4, 2), r"\(4, 2\)"),
        ("a", (3, 2), r"a must be \(2, 2\).* it is \(3, 2\)"),
        ("b", (1, 5, 3), r"it is \(1, 5, 3\)"),
        ("c", (1, 4, 2), r"c must be .* it is \(1, 4, 2\)"),
        ("d", (3,), r"d must be \(2,\)"),
        ("state", (1, 2, 3), r"state must be \(1, 2, 2\)"),
    ],
)
def test_errors_name_the_values(device, name, shape, message):
    given = dict(zip(NAMES, make(device, 1, 5, 2, 2), strict=True))
    given[name] = torch.ones(shape, device=device)
    with pytest.raises(ValueError, match=message):
        selective_scan(**given)


def test_more_errors(device):
    given = make(device, 1, 5, 2, 2)
    with pytest.raises(ValueError, match="float64"):
        selective_scan(given[0].double(), *given[1:])
    with pytest.raises(ValueError, match="at most 64; got 65"):
        selective_scan(*make(device, 1, 5, 2, 65))


def test_benchmark_entry(device):
    (entry,) = benchmarks()
    inputs = entry["inputs"]({"batch": 1, "tokens": 9, "channels": 2, "states": 2}, torch.float32, device)
    torch.testing.assert_close(entry["ours"](*inputs), entry["reference"](*inputs))


def agrees(function, device):
    inputs = [t.requires_grad_() for t in make(device, 1, 19, 3, 2)]
    results = []
    for f in (function, reference):
        out, last = f(*inputs, True)
        results.append([out, last, *torch.autograd.grad(out.sin().sum() + last.sin().sum(), inputs)])
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in zip(*results, strict=True))


def test_the_shipped_kernel_passes_the_check_of_the_mutants(device):
    assert agrees(selective_scan, device)


MUTANTS = {
    "the carried state does not fade": ("hidden = sums + faded * h[None, :, :]", "hidden = sums + h[None, :, :]"),
    "the reversed scan misses the shift": ("_load(delta, t + 1, channel", "_load(delta, t, channel"),
    "the reversed scan runs forward": ("            reverse=True,\n", "            reverse=False,\n"),
    "the state before is taken one token late": ("early = tl.where(rows > 0, t - 1, -1)", "early = t"),
    "the gradient of delta forgets the decay": (
        "along * inputs + tl.sum(through * rate[None, :, :], 2)",
        "along * inputs",
    ),
    "what comes from the chunk behind is dropped": ("ahead = _row(g, rows, 0)", "ahead = ahead * 0.0"),
    "the rate is not turned into powers of two": ("rate2 = rate * 1.4426950408889634", "rate2 = rate * 1.0"),
    "the skip is missing in the gradient": ("along * step + skip[None, :] * grad", "along * step"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(mutant, device, name):
    broken = mutant("selective_scan", *MUTANTS[name])
    assert not agrees(broken.selective_scan, device)

"""The first-order linear recurrence against the loop over tokens, and the algebra that it rests on."""

import pytest
import torch

from kernels import INTERPRET
from kernels.scan import benchmarks, doubling, linear_scan, reference

SIZES = [(1, 1, 1), (2, 7, 3), (1, 16, 4), (1, 17, 5), (2, 33, 2)]
SIZES += [] if INTERPRET else [(4, 1000, 100), (2, 4097, 64)]


def make(device, b, n, c, dtype=torch.float32, state=False):
    generator = torch.Generator().manual_seed(n)
    decay = torch.rand(b, n, c, generator=generator) * 2 - 1
    x, first = torch.randn(b, n, c, generator=generator), torch.randn(b, c, generator=generator)
    return [t.to(device, dtype) for t in ((decay, x, first) if state else (decay, x))]


@pytest.mark.parametrize("b, n, c", SIZES)
def test_equals_the_loop_forward_and_backward(device, as_exact_as_torch, b, n, c):
    as_exact_as_torch(linear_scan, reference, *make(device, b, n, c), wrt=(0, 1))
    as_exact_as_torch(linear_scan, reference, *make(device, b, n, c, state=True), wrt=(0, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, as_exact_as_torch, dtype):
    as_exact_as_torch(linear_scan, reference, *make(device, 1, 20, 3, dtype), wrt=(0, 1))


def test_gradients_in_double_precision(device, gradcheck):
    inputs = [x.requires_grad_() for x in make(device, 1, 5, 2, torch.float64, state=True)]
    gradcheck(lambda a, x, s: linear_scan(a, x, s, True), *inputs)
    inputs = [x.requires_grad_() for x in make(device, 1, 18, 1, torch.float64)]
    gradcheck(linear_scan, *inputs)


def test_a_decay_of_one_is_a_cumulative_sum(device):
    x = make(device, 2, 37, 3)[1]
    torch.testing.assert_close(linear_scan(torch.ones_like(x), x), x.cumsum(1))
    torch.testing.assert_close(linear_scan(torch.zeros_like(x), x), x)


def test_doubling_equals_the_loop(device):
    decay, x = make(device, 2, 37, 3)
    torch.testing.assert_close(doubling(decay, x), reference(decay, x))


def test_composition_is_associative_and_not_commutative():
    a, x = torch.randn(2, 3, dtype=torch.float64)
    then = lambda first, second: (first[0] * second[0], second[0] * first[1] + second[1])
    s = list(zip(a, x, strict=True))
    left, right = then(then(s[0], s[1]), s[2]), then(s[0], then(s[1], s[2]))
    torch.testing.assert_close(left, right)
    assert not torch.allclose(then(s[0], s[1])[1], then(s[1], s[0])[1])


def test_segments_chain(device):
    decay, x, first = make(device, 1, 30, 3, state=True)
    whole, end = linear_scan(decay, x, first, True)
    head, state = linear_scan(decay[:, :11], x[:, :11], first, True)
    tail, state = linear_scan(decay[:, 11:], x[:, 11:], state, True)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole)
    torch.testing.assert_close(state, end)


def test_strided_inputs(device):
    decay, x = make(device, 2, 19, 4)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (decay, x)]
    swapped = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (decay, x)]
    for others in (turned, swapped):
        leaves = [t.requires_grad_() for t in others]
        out = linear_scan(*leaves)
        torch.testing.assert_close(out, reference(decay, x))
        grad = torch.autograd.grad(out, leaves, torch.ones_like(x).expand_as(x))
        plain = [t.clone().requires_grad_() for t in (decay, x)]
        torch.testing.assert_close(grad, torch.autograd.grad(reference(*plain).sum(), plain))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(device, shape):
    x = torch.ones(shape, device=device, requires_grad=True)
    out, state = linear_scan(x, x, return_state=True)
    assert out.shape == shape and state.shape == (shape[0], shape[2])


@pytest.mark.parametrize(
    "decay, x, state, message",
    [
        (torch.ones(1, 5, 3), torch.ones(1, 5, 4), None, r"\(1, 5, 3\) and \(1, 5, 4\)"),
        (torch.ones(5, 3), torch.ones(5, 3), None, r"\(5, 3\)"),
        (torch.ones(1, 5, 3), torch.ones(1, 5, 3, dtype=torch.float64), None, "float64"),
        (torch.ones(1, 5, 3, dtype=torch.int64), torch.ones(1, 5, 3, dtype=torch.int64), None, "int64"),
        (torch.ones(1, 5, 3), torch.ones(1, 5, 3), torch.ones(2, 3), r"it is \(2, 3\)"),
    ],
)
def test_errors_name_the_values(device, decay, x, state, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(decay.to(device), x.to(device), None if state is None else state.to(device))


def test_benchmark_entry(device):
    (entry,) = benchmarks()
    inputs = entry["inputs"]({"batch": 1, "tokens": 20, "channels": 3}, torch.float32, device)
    torch.testing.assert_close(entry["ours"](*inputs), entry["reference"](*inputs))


def agrees(function, device):
    inputs = [x.requires_grad_() for x in make(device, 2, 37, 3, state=True)]
    results = []
    for f in (function, reference):
        out, last = f(*inputs, True)
        results.append([out, last, *torch.autograd.grad(out.sin().sum() + last.sin().sum(), inputs)])
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in zip(*results, strict=True))


def test_the_shipped_kernel_passes_the_check_of_the_mutants(device):
    assert agrees(linear_scan, device)


MUTANTS = {
    "the reversed scan misses the shift": ("decay + (t + 1)[:, None] * a_n", "decay + t[:, None] * a_n"),
    "the carried state does not fade": ("values = sums + faded * h[None, :]", "values = sums + h[None, :]"),
    "composed in the wrong order": ("decay2 * x1 + x2", "x1 + decay1 * x2"),
    "the gradient of the decay takes its own token's state": ("tl.load(out + here - channels", "tl.load(out + here"),
    "the gradient of the first state does not fade": ("carried[None, :] * first", "carried[None, :]"),
    "padding behind the end fades the state": ("mask=inside, other=1.0", "mask=inside, other=0.5"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(mutant, device, name):
    broken = mutant("scan", *MUTANTS[name])
    assert not agrees(broken.linear_scan, device)

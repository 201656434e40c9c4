"""Chunked linear attention and retention against the recurrence and the masked quadratic form."""

import pytest
import torch

from kernels import INTERPRET
from kernels.linear_attention import (
    benchmarks,
    linear_attention,
    normalized_linear_attention,
    quadratic,
    reference,
    retention_decay,
)

# tokens, key width, value width: one token, odd sizes, a chunk and one more, several segments, wide and narrow values
SIZES = [(1, 1, 1), (7, 3, 5), (32, 16, 16), (33, 5, 70), (63, 20, 3), (65, 7, 7), (130, 4, 6)]
SIZES += [] if INTERPRET else [(1000, 64, 128), (4097, 128, 64), (2048, 80, 96)]


def make(device, n, e, c, b=1, h=2, dtype=torch.float32, state=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, h, n, e), (b, h, n, e), (b, h, n, c)] + ([(b, h, e, c)] if state else [])
    q, k, v, *state = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return (q * e**-0.5, k, v, *state)


def decays(device, h=2):
    return torch.tensor([0.5, 0.97, 0.999][:h], device=device)


@pytest.mark.parametrize("n, e, c", SIZES)
@pytest.mark.parametrize("fading", [False, True])
def test_equals_the_recurrence_forward_and_backward(device, as_exact_as_torch, n, e, c, fading):
    decay = decays(device) if fading else None
    inputs = make(device, n, e, c)
    as_exact_as_torch(
        lambda q, k, v: linear_attention(q, k, v, decay, 0.7),
        lambda q, k, v: reference(q, k, v, decay, 0.7),
        *inputs,
        wrt=(0, 1, 2),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, as_exact_as_torch, dtype):
    decay = decays(device)
    inputs = make(device, 70, 16, 20, dtype=dtype)
    as_exact_as_torch(
        lambda q, k, v: linear_attention(q, k, v, decay), lambda q, k, v: reference(q, k, v, decay), *inputs,
        wrt=(0, 1, 2),
    )  # fmt: skip


@pytest.mark.parametrize("place", range(4))
def test_the_final_state_and_the_gradient_of_both(device, place):
    inputs = [x.double().requires_grad_() for x in make(device, 70, 5, 6, b=2, state=True)]
    results = []
    for function in (linear_attention, reference):
        out, last = function(*inputs[:3], decays(device).double(), None, inputs[3], True)
        loss = (out * out.detach().cos()).sum() + (last * last.detach().sin()).sum()
        results.append((out, last, torch.autograd.grad(loss, inputs[place])[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_the_state_is_used(device):
    q, k, v = (x.double().requires_grad_() for x in make(device, 40, 5, 6))
    state = linear_attention(q, k, v, return_state=True)[1]
    dq, dk, dv = torch.autograd.grad(state.square().sum(), (q, k, v))
    assert not dq.any()
    theirs = torch.autograd.grad(reference(q, k, v, return_state=True)[1].square().sum(), (k, v))
    torch.testing.assert_close((dk, dv), theirs)


def test_segments_chain(device):
    """A sequence in three calls, the state handed on, is the sequence in one call."""
    q, k, v, first = make(device, 100, 8, 8, state=True)
    whole, end = linear_attention(q, k, v, decays(device), state=first, return_state=True)
    parts, state = [], first
    for cut in (slice(0, 1), slice(1, 65), slice(65, 100)):
        out, state = linear_attention(q[:, :, cut], k[:, :, cut], v[:, :, cut], decays(device), None, state, True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("fading", [False, True])
def test_equals_the_quadratic_form(device, fading):
    decay = decays(device) if fading else None
    q, k, v = make(device, 65, 9, 4)
    torch.testing.assert_close(linear_attention(q, k, v, decay, 0.5), quadratic(q, k, v, decay, 0.5))


@pytest.mark.parametrize("e, c", [(300, 4), (4, 300)])
def test_widths_beyond_one_piece(device, e, c):
    q, k, v, state = make(device, 70, e, c, h=1, state=True)
    inputs = [x.requires_grad_() for x in (q, k, v, state)]
    results = []
    for function in (linear_attention, reference):
        out, last = function(q, k, v, decays(device, 1), None, state, True)
        results.append([out, last, *torch.autograd.grad(out.sin().sum() + last.sin().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [1e-30, 1e-3, 1 - 1e-6, 1.0])
def test_extreme_decays_stay_finite_and_exact(device, gamma):
    """gamma^n is far below the smallest float; nothing is divided by it."""
    q, k, v = make(device, 130, 4, 4)
    decay = torch.tensor([gamma, 0.9], device=device)
    exact = reference(q.double(), k.double(), v.double(), decay.double())
    torch.testing.assert_close(linear_attention(q, k, v, decay).double(), exact, rtol=1e-4, atol=1e-4)


def test_gradients_in_double_precision(device, gradcheck):
    inputs = [x.double().requires_grad_() for x in make(device, 4, 2, 2, h=1, state=True)]
    decay = torch.tensor([0.7], dtype=torch.float64, device=device)
    gradcheck(lambda q, k, v, s: linear_attention(q, k, v, decay, 0.3, s, True), *inputs)
    gradcheck(linear_attention, *inputs[:3])


def test_gradients_across_segments_in_double_precision(device, gradcheck):
    """Only the value of the first token moves, and its gradient comes back through three segments."""
    q, k, v = (x.double() for x in make(device, 130, 1, 1, h=1))
    late = lambda first: linear_attention(q, k, torch.cat([first, v[:, :, 1:]], 2))[:, :, -2:]
    gradcheck(late, v[:, :, :1].clone().requires_grad_())


def test_strided_inputs(device):
    q, k, v = make(device, 40, 6, 6)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]  # (b, n, h, e) in memory
    columns = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]  # rows are not contiguous
    want = linear_attention(q, k, v, decays(device))
    for others in (turned, columns):
        assert not others[0].is_contiguous()
        leaves = [x.detach().requires_grad_() for x in others]
        out = linear_attention(*leaves, decays(device))
        torch.testing.assert_close(out, want)
        grads = torch.autograd.grad(out, leaves, want.transpose(1, 2).contiguous().transpose(1, 2))
        plain = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.testing.assert_close(grads, torch.autograd.grad(linear_attention(*plain, decays(device)), plain, want))


@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (1, 2, 0, 3), (1, 2, 5, 0)])
def test_empty(device, shape):
    q = torch.ones(shape, device=device, requires_grad=True)
    out, state = linear_attention(q, q, q, return_state=True)
    assert out.shape == shape and state.shape == (*shape[:2], shape[3], shape[3])
    assert not torch.autograd.grad(out.sum(), q)[0].any()


def test_normalized_weights_sum_to_one(device):
    q, k, v = make(device, 40, 6, 5)
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    torch.testing.assert_close(normalized_linear_attention(q, k, torch.ones_like(v)), torch.ones_like(v))
    weights = (q @ k.transpose(-1, -2)).tril()
    torch.testing.assert_close(normalized_linear_attention(q, k, v), weights / weights.sum(-1, keepdim=True) @ v)
    mixed = torch.ones(1, 1, 1, 40, dtype=torch.bool, device=device)
    mixed[..., :7] = False
    shorter = normalized_linear_attention(q[:, :, 7:], k[:, :, 7:], v[:, :, 7:])
    torch.testing.assert_close(normalized_linear_attention(q, k, v, mask=mixed)[:, :, 7:], shorter)


def test_retention_decay(device):
    torch.testing.assert_close(
        retention_decay(3, device), torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128], device=device)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.ones(1, 2, 5, 4)}, r"\(1, 2, 5, 4\)"),
        ({"q": torch.ones(2, 5, 3)}, r"\(2, 5, 3\)"),
        ({"v": torch.ones(1, 2, 6, 3)}, r"\(1, 2, 6, 3\)"),
        ({"v": torch.ones(1, 2, 5, 3, dtype=torch.float64)}, "float64"),
        ({"decay": torch.ones(3)}, r"\(2,\); got \(3,\)"),
        ({"decay": torch.ones(2, requires_grad=True)}, "constant"),
        ({"state": torch.ones(1, 2, 3, 4)}, r"\(1, 2, 3, 4\)"),
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, r"\(5, 5\)"),
    ],
)
def test_errors_name_the_values(device, change, message):
    good = {name: torch.ones(1, 2, 5, 3) for name in "qkv"}
    given = {name: x.to(device) if not x.requires_grad else x for name, x in {**good, **change}.items()}
    if change.get("decay") is not None and change["decay"].requires_grad:
        given["decay"] = change["decay"].detach().to(device).requires_grad_()
    with pytest.raises(ValueError, match=message):
        linear_attention(**given)


@pytest.mark.skipif(not INTERPRET, reason="a GPU would have to stop to look at the values")
def test_a_decay_outside_is_refused(device):
    q = torch.ones(1, 2, 5, 3)
    for gamma in (0.0, 1.5, -0.5):
        with pytest.raises(ValueError, match=f"got .*{gamma}"):
            linear_attention(q, q, q, torch.tensor([gamma, 0.5]))


def test_benchmark_entry(device):
    (entry,) = benchmarks()
    size = {"batch": 1, "heads": 2, "tokens": 40, "width": 16}
    inputs = entry["inputs"](size, torch.float32, device)
    torch.testing.assert_close(entry["ours"](*inputs), entry["reference"](*inputs), rtol=1e-4, atol=1e-4)
    assert entry["bytes"](size, 2) == 4 * 2 * 40 * 16 * 2


# --------------------------------------------------------------------------------------------------------- mutants


def agrees(function, device):
    """The check that the shipped kernel passes: outputs, final state and all gradients, over three segments."""
    inputs = [x.requires_grad_() for x in make(device, 130, 4, 5, state=True)]
    results = []
    for f in (function, reference):
        out, last = f(*inputs[:3], decays(device), 0.5, inputs[3], True)
        results.append([out, last, *torch.autograd.grad(out.sin().sum() + last.sin().sum(), inputs)])
    close = lambda x, y: torch.allclose(x, y, rtol=1e-3, atol=1e-3)
    return all(close(x, y) for x, y in zip(*results, strict=True))


def test_the_shipped_kernel_passes_the_check_of_the_mutants(device):
    assert agrees(linear_attention, device)


MUTANTS = {
    "the carried state forgets to fade between segments": (
        "state = state * fade + tl.load(states + slot", "state = state + tl.load(states + slot"
    ),
    "the carried state forgets to fade between chunks": ("faded, state * fade, input", "faded, state, input"),
    "the state is read one step too fresh": ("(i + 1 - REVERSE)", "(i - REVERSE)"),
    "the way back fades as the way forward": ("(i + 1 - REVERSE)", "(i + 1)"),
    "keys fade one step too many on their way into the state": (
        "weight = weight * tl.exp2((CHUNK - 1 - i + REVERSE) * log_gamma)\n    state",
        "weight = weight * tl.exp2((CHUNK - i + REVERSE) * log_gamma)\n    state",
    ),
    "the last chunk fades as a full one": ("fade = tl.exp2(left * log_gamma)", "fade = tl.exp2(CHUNK * log_gamma)"),
    "a token does not see itself": ("tl.where(back >= 0, 1.0, 0.0)", "tl.where(back > 0, 1.0, 0.0)"),
    "the future is seen": ("tl.where(back >= 0, 1.0, 0.0)", "tl.where(back >= -9999, 1.0, 0.0)"),
    "the initial state is dropped": ("state = tl.load(initial + head", "state = 0.0 * tl.load(initial + head"),
    "backward reads the states untransposed": (
        "_attend(v, grad, q, log_decay, turned(ahead)", "_attend(v, grad, q, log_decay, ahead"
    ),
    "the scale is missing on the way back": ("grad_last, plan, write=scale", "grad_last, plan, write=1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(mutant, device, name):
    broken = mutant("linear_attention", *MUTANTS[name])
    try:
        assert not agrees(broken.linear_attention, device)
    except IndexError:
        pass  # the guard saw it read outside a tensor

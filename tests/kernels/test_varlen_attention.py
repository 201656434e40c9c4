"""kernels/varlen_attention.py: packed sequences against a loop over sequences, forward and backward."""

import pytest
import torch

from kernels import varlen_attention as module
from kernels.varlen_attention import reference, varlen_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCHES = {
    "one row": [1],
    "seven": [7],
    "ragged": [3, 0, 70, 1, 33],
    "around a block": [63, 64, 65],
    "three blocks": [130, 5],
}


def packed(lengths, heads, kv_heads, e, device, dtype=torch.float32):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    total = sum(lengths)
    q = torch.randn(total, heads, e, dtype=dtype, device=device)
    k, v = torch.randn(2, total, kv_heads, e, dtype=dtype, device=device).unbind(0)
    return q, k, v, offsets, max(lengths, default=0)


def same(ours, theirs, inputs, **options):
    """Largest difference of the outputs and of the three gradients."""
    q, k, v, *rest = inputs
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, *rest, **options)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    return all(torch.allclose(a, b, atol=2e-5, rtol=1e-4) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_equals_the_loop_over_sequences(lengths, causal, device):
    assert same(varlen_attention, reference, packed(lengths, 2, 2, 16, device), causal=causal)


@pytest.mark.parametrize("heads, kv_heads, e", [(4, 2, 20), (3, 1, 32), (1, 1, 1), (2, 1, 130)])
def test_grouped_heads_and_odd_widths(heads, kv_heads, e, device):
    assert same(varlen_attention, reference, packed([5, 66], heads, kv_heads, e, device), causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_as_exact_as_torch(dtype, causal, device, as_exact_as_torch):
    inputs = packed([65, 7], 2, 1, 32, device, dtype)
    as_exact_as_torch(varlen_attention, reference, *inputs, causal, wrt=(0, 1, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal, device, gradcheck):
    q, k, v, offsets, longest = packed([2, 1], 2 if causal else 1, 1, 2, device, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attend = lambda q, k, v: varlen_attention(q, k, v, offsets, longest, causal)
    assert gradcheck(attend, *leaves, check_undefined_grad=False)


def test_views_of_a_fused_projection_and_transposed_inputs(device):
    fused = torch.randn(20, 3, 2, 16, device=device)
    offsets = torch.tensor([0, 12, 20], dtype=torch.int32, device=device)
    assert same(varlen_attention, reference, (*fused.unbind(1), offsets, 12), causal=True)
    across = [torch.randn(16, 2, 20, device=device).permute(2, 1, 0) for _ in range(3)]  # the last stride is not 1
    assert torch.allclose(varlen_attention(*across, offsets, 12), reference(*across, offsets, 12), atol=1e-5)
    q, k, v = (x.clone().requires_grad_() for x in fused.unbind(1))
    summed = varlen_attention(q, k, v, offsets, 12).sum()  # its gradient is an expanded one
    expected = torch.autograd.grad(reference(q, k, v, offsets, 12).sum(), (q, k, v))
    for got, want in zip(torch.autograd.grad(summed, (q, k, v)), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def test_large_scores_stay_finite(device):
    q, k, v, offsets, longest = packed([70], 1, 1, 16, device)
    assert torch.allclose(varlen_attention(60 * q, k, v, offsets, longest),
                          reference(60 * q, k, v, offsets, longest), atol=1e-3)  # fmt: skip


def test_scale_and_a_longer_max_length(device):
    q, k, v, offsets, longest = packed([9, 4], 2, 2, 16, device)
    want = reference(q, k, v, offsets, longest, scale=0.3)
    assert torch.allclose(varlen_attention(q, k, v, offsets, 200, scale=0.3), want, atol=1e-5)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_do(lengths, device):
    q, k, v, offsets, longest = packed(lengths, 2, 2, 16, device)
    q.requires_grad_()
    out = varlen_attention(q, k, v, offsets, longest)
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_a_sequence_does_not_see_its_neighbors(device):
    q, k, v, offsets, longest = packed([5, 6, 7], 2, 2, 16, device)
    before = varlen_attention(q, k, v, offsets, longest)
    k[5:11], v[5:11] = 1e4, -1e4
    after = varlen_attention(q, k, v, offsets, longest)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[11:], after[11:])
    assert not torch.allclose(before[5:11], after[5:11])


def test_gradients_are_the_same_bits_every_time(device):
    q, k, v, offsets, longest = packed([70, 9], 4, 1, 16, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    runs = [torch.autograd.grad(varlen_attention(*leaves, offsets, longest).square().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def error(message, change, device):
    q, k, v, offsets, longest = packed([3, 4], 2, 2, 16, device)
    given = dict(q=q, k=k, v=v, offsets=offsets, max_length=longest)
    with pytest.raises(ValueError, match=message):
        varlen_attention(**{**given, **change(given)})


@pytest.mark.parametrize(
    "message, change",
    [
        (r"\(7, 2, 16\), \(6, 2, 16\)", lambda g: {"k": g["k"][:6]}),
        ("3 key heads do not divide 2", lambda g: dict.fromkeys("kv", torch.randn(7, 3, 16).to(g["q"]))),
        ("not 300", lambda g: dict.fromkeys("qkv", torch.randn(7, 2, 300).to(g["q"]))),
        ("torch.int64", lambda g: {"offsets": g["offsets"].long()}),
        ("float16", lambda g: {"v": g["v"].half()}),
    ],
    ids=["rows", "heads", "width", "type of offsets", "mixed types"],
)
def test_errors(message, change, device):
    error(message, change, device)


@pytest.mark.parametrize(
    "message, change",
    [
        ("number of rows, 7", lambda g: {"offsets": g["offsets"] - 1}),
        (r"\[0, 5, 3\]", lambda g: {"offsets": torch.tensor([0, 5, 3], dtype=torch.int32)}),
        ("a sequence of 4 is longer than max_length 3", lambda g: {"max_length": 3}),
    ],
    ids=["shifted", "falling", "max_length"],
)
def test_errors_in_the_values_of_offsets(message, change, device):
    if device.type != "cpu":
        pytest.skip("on a GPU nobody looks at the values")
    error(message, change, device)


BEGIN = "# the longest work first\n    begin = tl.load(offsets + sequence).to(tl.int64)\n"
END = "    n = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)\n"
MUTANTS = {
    "a sequence ends one row late": (BEGIN + END, BEGIN + END.replace("begin)", "begin + 1)")),
    "a sequence begins one row early": (BEGIN, BEGIN.replace("int64)", "int64) - tl.where(sequence > 0, 1, 0)")),
    "the sums are not rescaled": ("total = total * shrink + tl.sum(weights, 1)", "total = total + tl.sum(weights, 1)"),
    "lse without its sum": ("top + tl.log2(total), row < n)", "top, row < n)"),
    "delta forgotten in dq": ("ds = weights * (wanted - delta[:, None])", "ds = weights * wanted"),
    "delta forgotten in dk": ("ds = weights * (wanted - row_delta[None])", "ds = weights * wanted"),
    "only the first head of a group counts": ("for member in range(GROUP):", "for member in range(1):"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name, mutant, device):
    broken = mutant("varlen_attention", *MUTANTS[name]).varlen_attention
    inputs = packed([66, 9], 2, 1, 16, device)
    assert same(varlen_attention, reference, inputs)
    try:
        assert not same(broken, reference, inputs), name
    except Exception as error:  # the guard: a helper's IndexError arrives as an InterpreterError
        assert "outside every tensor" in str(error), error


def test_a_causal_mutant_is_caught(mutant, device):
    broken = mutant("varlen_attention", "low = start // M * M if CAUSAL else 0", "low = start + M").varlen_attention
    inputs = packed([70], 1, 1, 16, device)
    assert same(varlen_attention, reference, inputs, causal=True)
    assert not same(broken, reference, inputs, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_a_max_length_that_is_too_small_spoils_what_it_cannot_reach(causal, device, monkeypatch):
    """On a GPU nobody looks at the offsets, so the rows beyond must not keep what lay in memory: they become NaN."""
    monkeypatch.setattr(module, "empty", lambda shape, like, dtype=None: torch.zeros(shape, dtype=dtype or like.dtype))
    offsets = torch.tensor([0, 150, 190], dtype=torch.int32)
    q, k, v, grad = (torch.randn(190, 2, 8) for _ in range(4))
    out, lse = module.compute(q, k, v, offsets, 60, causal, 0.5)
    right = reference(q, k, v, offsets, 150, causal, 0.5)
    assert torch.allclose(out[:64], right[:64], atol=1e-5) and torch.allclose(out[150:], right[150:], atol=1e-5)
    assert out[64:150].isnan().all() and lse[:, 64:150].isnan().all()
    dq, dk, dv = module.differentiate(q, k, v, out, lse, offsets, grad, 60, causal, 0.5)
    assert all(x[64:150].isnan().all() and x[150:].isfinite().all() for x in (dq, dk, dv))

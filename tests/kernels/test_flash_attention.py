"""Flash attention against the written-out form, torch's own and the zoo's; memory counted; and broken copies."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.flash_attention as module
from kernels import DEVICE, INTERPRET
from kernels.flash_attention import benchmarks, flash_attention, pairs, reference


def tensors(device, q, k, v=None, dtype=torch.float32, seed=0):
    """Random q (b, h, n, e), k (b, h_kv, m, e) and v (b, h_kv, m, c) that want gradients."""
    g = torch.Generator().manual_seed(seed)
    shapes = q, k, v or k
    return tuple(torch.randn(s, generator=g, dtype=dtype).to(device).requires_grad_() for s in shapes)


def close(x, y, what=""):
    """Equal to float32 rounding, infinities in the same places."""
    assert torch.equal(x.isinf(), y.isinf()), f"{what}: infinite in other places"
    x, y = x.masked_fill(x.isinf(), 0).double(), y.masked_fill(y.isinf(), 0).double()
    largest = max(1.0, y.abs().max().item() if y.numel() else 1.0)
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * largest, msg=lambda text: f"{what}: {text}")


def agree(ours, inputs, *, theirs=reference, **options):
    """Output, log-sum-exp and all gradients (of a random sum of both) agree."""
    found = []
    for function in (ours, theirs):
        out, lse = function(*inputs, return_lse=True, **options)
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=g).to(x) for x in (out, lse)]
        loss = (out * weights[0]).sum() + (lse.masked_fill(lse == -math.inf, 0) * weights[1]).sum()
        leaves = [x for x in (*inputs, *options.values()) if torch.is_tensor(x) and x.requires_grad]
        found.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for place, pair in enumerate(zip(*found, strict=True)):
        close(*pair, what=f"result {place}")


SHAPES = {  # q, k, v
    "one": ((1, 1, 1, 16), (1, 1, 1, 16), None),
    "odd": ((2, 1, 7, 20), (2, 1, 9, 20), (2, 1, 9, 5)),
    "a block less one": ((1, 1, 63, 32), (1, 1, 63, 32), None),
    "a block and one": ((1, 1, 65, 16), (1, 1, 65, 16), None),
    "three blocks": ((1, 1, 130, 48), (1, 1, 190, 48), None),
    "grouped": ((1, 4, 33, 16), (1, 2, 70, 16), (1, 2, 70, 24)),
    "one head of keys": ((2, 2, 20, 16), (2, 1, 65, 16), None),
    "wide": ((1, 1, 10, 200), (1, 1, 12, 200), (1, 1, 12, 256)),
}
MASKS = {
    "all": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": 20},
    "window": {"window": 9},
}


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products in float32 on a GPU too, for the comparisons with a fixed tolerance."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


CASES = [(s, m) for s in SHAPES for m in MASKS if s == "three blocks" or m in ("all", "causal window")]


@pytest.mark.parametrize(("shape", "mask"), CASES)
def test_equals_reference(device, shape, mask):
    agree(flash_attention, tensors(device, *SHAPES[shape]), **MASKS[mask])


@pytest.mark.skipif(not INTERPRET, reason="on a GPU the autotuner chooses the blocks")
@pytest.mark.parametrize("blocks", [(16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("options", [{"causal": True, "window": 35}, {"window": 17}], ids=str)
def test_any_blocks(device, monkeypatch, blocks, options):
    constants = dict(zip(("BLOCK_M", "BLOCK_N"), blocks, strict=True))
    for kernel in (module._forward, module._backward_keys, module._backward_queries):
        monkeypatch.setattr(kernel.configs[0], "kwargs", constants)
    agree(flash_attention, tensors(device, (1, 1, 70, 16), (1, 1, 90, 16)), **options)


BIASES = [(2, 2, 20, 70), (2, 20, 70), (2, 1, 1, 70), (20, 1), (1, 70), (2, 1, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_bias_and_its_gradient(device, shape):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    causal = len(shape) == 3
    agree(flash_attention, tensors(device, (2, 2, 20, 16), (2, 1, 70, 16)), bias=bias, causal=causal)


def test_bias_of_minus_infinity_hides(device):
    q, k, v = tensors(device, (1, 1, 9, 16), (1, 1, 9, 16))
    bias = torch.zeros(9, 9, device=device).masked_fill(torch.rand(9, 9, device=device) > 0.5, -math.inf)
    bias[3] = -math.inf
    agree(flash_attention, (q, k, v), bias=bias.requires_grad_())
    assert (flash_attention(q, k, v, bias=bias)[:, :, 3] == 0).all()


@pytest.mark.parametrize("options", [{"causal": True, "window": 40}, {}], ids=str)
def test_slopes_and_their_gradient(device, options):
    slopes = torch.tensor([0.5, 0.03], device=device, requires_grad=True)
    agree(flash_attention, tensors(device, (1, 2, 65, 16), (1, 2, 70, 16)), bias=slopes, **options)


@pytest.mark.parametrize("shape", [(2, 1, 1, 70), (20, 70), (2, 2, 20, 70)], ids=str)
def test_mask(device, shape):
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.3).to(device)
    agree(flash_attention, tensors(device, (2, 2, 20, 16), (2, 2, 70, 16)), mask=mask, causal=len(shape) == 2)


def test_rows_that_see_nothing(device):
    q, k, v = tensors(device, (1, 1, 70, 16), (1, 1, 70, 16))
    mask = torch.ones(70, 70, dtype=torch.bool, device=device)
    mask[[0, 5, 69]] = False
    agree(flash_attention, (q, k, v), mask=mask)
    out, lse = flash_attention(q, k, v, mask=mask, return_lse=True)
    grads = torch.autograd.grad((out + lse[..., None].exp()).sum(), (q, k, v))
    assert (out[:, :, [0, 5, 69]] == 0).all() and (lse[:, :, [0, 5, 69]] == -math.inf).all()
    assert (grads[0][:, :, [0, 5, 69]] == 0).all() and all(g.isfinite().all() for g in grads)
    blind = flash_attention(q, k, v, mask=mask[:1, :1], return_lse=True)  # nobody sees anything
    assert (blind[0] == 0).all() and (blind[1] == -math.inf).all()
    agree(flash_attention, tensors(device, (1, 1, 90, 16), (1, 1, 20, 16)), window=5)  # the first 66 queries see none


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(device, scale):
    agree(flash_attention, tensors(device, (1, 1, 20, 16), (1, 1, 33, 16)), scale=scale)


def test_large_scores_neither_overflow_nor_vanish(device):
    q, k, v = (x.detach() for x in tensors(device, (1, 1, 40, 16), (1, 1, 70, 16)))
    out, lse = flash_attention(q * 60, k * 60, v, return_lse=True)
    want = reference(q.double() * 60, k.double() * 60, v.double(), return_lse=True)
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": 30}], ids=str)
def test_as_exact_as_torch(device, as_exact_as_torch, dtype, options):
    q, k, v = tensors(device, (1, 2, 40, 24), (1, 1, 70, 24), dtype=dtype)
    as_exact_as_torch(
        lambda q, k, v: flash_attention(q, k, v, **options),
        lambda q, k, v: reference(q, k, v, **options), q, k, v, wrt=(0, 1, 2),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_as_exact_as_torch_with_bias(device, as_exact_as_torch, dtype):
    q, k, v = tensors(device, (2, 1, 40, 16), (2, 1, 70, 16), dtype=dtype)
    bias = torch.randn(1, 40, 70, device=device).to(dtype)
    run = lambda function: lambda q, k, v, bias: function(q, k, v, bias=bias)
    as_exact_as_torch(run(flash_attention), run(reference), q, k, v, bias, wrt=(0, 1, 2, 3))


@pytest.mark.parametrize("what", ["plain", "causal window, grouped", "bias", "slopes", "mask"])
def test_gradcheck(device, gradcheck, what):
    heads = 1 if "grouped" in what else 2
    inputs = list(tensors(device, (1, 2, 3, 4), (1, heads, 4, 4), (1, heads, 4, 3), dtype=torch.float64))
    if what == "plain":  # every entry by itself
        inputs = list(tensors(device, (1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 1), dtype=torch.float64))
    options = {"causal": True, "window": 2} if "window" in what else {}
    if what == "bias":
        inputs.append(torch.randn(2, 1, 4, dtype=torch.float64, device=device, requires_grad=True))
    if what == "slopes":
        inputs.append(torch.rand(2, dtype=torch.float64, device=device).requires_grad_())
    if what == "mask":
        options["mask"] = torch.tensor([True, False, True, True], device=device)[None]

    def run(q, k, v, bias=None):
        return flash_attention(q, k, v, bias=bias, return_lse=True, **options)

    assert gradcheck(run, *inputs, fast_mode=what != "plain", check_undefined_grad=what == "plain")


def test_strides(device):
    """Tokens first, as a fused projection leaves them, a transposed width and a broadcast gradient."""
    qkv = torch.randn(2, 33, 3, 2, 16, device=device).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    agree(flash_attention, (q, k, v))
    width_first = torch.randn(1, 2, 16, 40, device=device).transpose(-2, -1).requires_grad_()
    agree(flash_attention, (width_first, width_first, width_first), causal=True)
    grad = torch.autograd.grad(flash_attention(q, k, v).sum(), qkv)[0]  # the gradient of out has stride 0
    close(grad, torch.autograd.grad(reference(q, k, v).sum(), qkv)[0])
    out = flash_attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous(), "merging the heads should copy nothing"


def test_bias_and_mask_through_strides(device):
    q, k, v = tensors(device, (2, 2, 40, 16), (2, 2, 50, 16))
    bias = torch.randn(2, 50, 40, device=device).transpose(1, 2)
    mask = (torch.rand(2, 1, 50, 40, device=device) > 0.3).transpose(2, 3)
    agree(flash_attention, (q, k, v), bias=bias, mask=mask)


def test_empty(device):
    for q, k in [((0, 2, 3, 16), (0, 2, 3, 16)), ((1, 2, 0, 16), (1, 2, 3, 16)), ((1, 2, 3, 16), (1, 2, 0, 16))]:
        q, k, v = tensors(device, q, k)
        out, lse = flash_attention(q, k, v, return_lse=True)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        assert (out == 0).all() and (lse == -math.inf).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_messages(device):
    q, k, v = (x.detach() for x in tensors(device, (2, 4, 6, 16), (2, 2, 8, 16)))
    zeros = partial(torch.zeros, device=device)
    wrong = {
        r"four dimensions.*\(4, 6, 16\)": lambda: flash_attention(q[0], k[0], v[0]),
        r"need q .*\(2, 2, 8, 12\)": lambda: flash_attention(q, k[..., :12], v),
        r"need q .*\(2, 2, 7, 16\)": lambda: flash_attention(q, k, v[:, :, :7]),
        "3 query heads do not divide into 2": lambda: flash_attention(q[:, :3], k, v),
        "1 to 256; got 300": lambda: flash_attention(*(zeros(1, 1, 2, 300) for _ in "qkv")),
        "at least 1; got 0": lambda: flash_attention(q, k, v, window=0),
        "as many keys as queries; got 8 and 6": lambda: flash_attention(k, q[:, :2], q[:, :2], causal=True),
        r"bias \(2, 6, 9\) does not broadcast": lambda: flash_attention(q, k, v, bias=zeros(2, 6, 9)),
        r"slope for each of 4 heads; got \(8,\)": lambda: flash_attention(q, k, v, bias=zeros(8)),
        "True where attention is allowed.*float32": lambda: flash_attention(q, k, v, mask=zeros(6, 8)),
        r"mask \(5, 8\) does not broadcast": lambda: flash_attention(q, k, v, mask=zeros(5, 8).bool()),
        "v is torch.float16": lambda: flash_attention(q, k, v.half()),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_launches_name_every_argument(device, monkeypatch):
    """The interpreter drops names that a kernel does not know, and a GPU refuses them; neither may happen."""
    launched = {}

    def note(kernel, blocks, shared, **own):
        blocks(constants := kernel.configs[0].kwargs)
        launched[kernel.base_fn.__name__] = kernel.arg_names, {*shared, *own, *constants}
        kernel[lambda c: (blocks(c),)](**shared, **own)

    monkeypatch.setattr(module, "_launch", note)
    bias = torch.zeros(3, 3, device=device, requires_grad=True)
    flash_attention(*tensors(device, (1, 1, 3, 16), (1, 1, 3, 16)), bias=bias).sum().backward()
    assert set(launched) == {"_forward", "_backward_keys", "_backward_queries", "_backward_bias"}
    for name, (wanted, given) in launched.items():
        assert set(wanted) == given, f"{name}: {set(wanted) ^ given}"


def test_no_second_derivative(device):
    q, k, v = tensors(device, (1, 1, 3, 16), (1, 1, 3, 16))
    (grad,) = torch.autograd.grad(flash_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_same_bits_twice(device):
    inputs = tensors(device, (1, 2, 66, 16), (1, 1, 70, 16))
    bias = torch.randn(66, 70, device=device).requires_grad_()
    loss = lambda: flash_attention(*inputs, bias=bias).square().sum()
    runs = [torch.autograd.grad(loss(), (*inputs, bias)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --------------------------------------------------------------------------------------------------- what it stands for


@pytest.mark.parametrize("causal", [False, True])
def test_equals_scaled_dot_product_attention(device, causal):
    q, k, v = tensors(device, (2, 4, 66, 32), (2, 4, 66, 32))
    close(flash_attention(q, k, v, causal=causal), F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    q, k, v = tensors(device, (2, 4, 33, 16), (2, 2, 66, 16))
    ours, theirs = flash_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    close(ours, theirs)


def test_stands_in_the_attend_slot(device):
    from tfkit.zoo.attention import MultiHeadAttention, attention, causal_attention, padding_mask

    x = torch.randn(2, 21, 32, device=device)
    real = padding_mask((torch.arange(21) < torch.tensor([[21], [13]])).to(device))
    for theirs, causal in ((attention, False), (causal_attention, True)):
        layer = MultiHeadAttention(32, 2, attend=theirs).to(device)
        other = MultiHeadAttention(32, 2, attend=partial(flash_attention, causal=causal)).to(device)
        other.load_state_dict(layer.state_dict())
        for mask in (None, real):
            close(other(x, mask), layer(x, mask))
            mine = torch.autograd.grad(other(x, mask).square().sum(), other.parameters())
            for a, b in zip(mine, torch.autograd.grad(layer(x, mask).square().sum(), layer.parameters()), strict=True):
                close(a, b)
        close(other.maps(x), layer.maps(x))
    q, k, v = tensors(device, (1, 2, 5, 16), (1, 2, 9, 16))
    close(flash_attention(q, k, v, causal=True), causal_attention(q, k, v))


def test_stands_under_the_positions_of_the_zoo(device):
    from tfkit.zoo.attention import causal_attention
    from tfkit.zoo.positions import Alibi, Rotary, T5Bias, t5_causal_buckets

    q, k, v = tensors(device, (1, 4, 20, 16), (1, 4, 40, 16))
    alibi, causal = Alibi(4).to(device), partial(flash_attention, causal=True)
    close(causal(q, k, v, bias=alibi.slopes), alibi(q, k, v))  # slopes in the kernel, no table
    close(Alibi(4, attend=causal).to(device)(q, k, v), alibi(q, k, v))
    for make in (lambda a: T5Bias(4, a, t5_causal_buckets), lambda a: Rotary(16, a)):
        mine, theirs = make(causal).to(device), make(causal_attention).to(device)
        mine.load_state_dict(theirs.state_dict())
        close(mine(q, k, v), theirs(q, k, v))
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):  # the table of T5's biases
            grads = [torch.autograd.grad(f(q, k, v).square().sum(), p)[0] for f, p in ((mine, a), (theirs, b))]
            close(*grads)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation inside returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 8}, {"bias": "slopes"}], ids=str)
def test_no_table_of_queries_by_keys_is_made(device, options):
    n, e = 200, 16
    q, k, v = tensors(device, (1, 1, n, e), (1, 1, n, e))
    if "bias" in options:
        options = {"bias": torch.tensor([0.1], device=device), "causal": True}
    with Largest() as ours:
        out = flash_attention(q, k, v, **options)
        out.sum().backward()
    with Largest() as theirs:
        reference(q, k, v, **options).sum().backward()
    assert ours.bytes <= 4 * n * e and theirs.bytes >= 4 * n * n, (ours.bytes, theirs.bytes)


def test_saves_one_number_a_query_beside_inputs_and_output(device):
    from tfkit import measure

    q, k, v = tensors(device, (2, 3, 50, 16), (2, 3, 60, 16))
    saved = measure.saved_bytes(partial(flash_attention, causal=True), q, k, v)
    assert saved == 2 * 3 * 50 * (16 + 1) * 4  # out and the log-sum-exp


def test_pairs_and_benchmarks():
    four = [(7, 9, {"causal": True}), (5, 5, {"window": 2}), (9, 12, {"causal": True, "window": 4}), (3, 4, {})]
    for n, m, options in four:
        q, k = torch.zeros(1, 1, n, 1), torch.zeros(1, 1, m, 1)
        lse = reference(q, k, k, return_lse=True, scale=0.0, **options)[1]  # the logarithm of how many each row sees
        assert pairs(n, m, **options) == round(lse.exp().sum().item())
    for entry in benchmarks():
        size = {"b": 1, "h": 2, "n": 32, "e": 16}
        inputs = entry["inputs"](size, torch.float32, DEVICE)
        close(entry["ours"](*inputs), entry["reference"](*inputs))
        assert entry["flops"](size) > 0


# -------------------------------------------------------------------------------------------------------- broken copies

MUTANTS = {
    "the sums are not rescaled": ("total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    "the output is not rescaled": ("acc = acc * shrink[:, None]", "acc = acc * 1.0"),
    "the diagonal is hidden": ("(j <= i + (m - n) + ahead)", "(j < i + (m - n) + ahead)"),
    "the next token is seen": ("(j <= i + (m - n) + ahead)", "(j <= i + (m - n) + ahead + 1)"),
    "the queries are the first of the keys": ("(j <= i + (m - n) + ahead)", "(j <= i + ahead)"),
    "the window is one too long": ("(j >= i + (m - n) - behind)", "(j >= i + (m - n) - behind - 1)"),
    "the band starts a block late": (
        "first = tl.maximum(low - before, 0) // BLOCK * BLOCK",
        "first = tl.maximum(low - before, 0) // BLOCK * BLOCK + BLOCK",
    ),
    "the band ends a key early": ("tl.minimum(high + after + 1, size), fi", "tl.minimum(high + after, size), fi"),
    "an edge block goes unmasked": ("inner = tl.minimum(tl.maximum(inner, first), last)", "inner = first"),
    "the slope ignores the offset": (
        "dots = (dots * scale - slope * tl.abs(i + (m - n) - j)) * LOG2E",
        "dots = (dots * scale - slope * tl.abs(i - j)) * LOG2E",
    ),
    "delta is missing in dk": ("ds = p * (dp - change[None, :])", "ds = p * dp"),
    "the scale is missing in dk": ("sum_k * scale", "sum_k"),
    "the scale is missing in dq": ("acc * scale, i, heads * E", "acc, i, heads * E"),
    "the heads of a group go round": ("h = h_kv * group + member", "h = h_kv + member * few"),
    "the log-sum-exp has no gradient": ("total -= tl.load(dlse", "total -= 0.0 * tl.load(dlse"),
    "the log-sum-exp is in powers of two": ("(top + tl.log2(total)) * LN2", "(top + tl.log2(total))"),
    "the bias forgets the batch it was broadcast over": ("range(own_b, batch, many_b)", "range(own_b, own_b + 1)"),
}  # fmt: skip


def thorough(function, device):
    """Small, and every part of every kernel matters: edges, offset, groups, slopes, a bias, the log-sum-exp."""
    inputs = tensors(device, (1, 1, 70, 16), (1, 1, 129, 16))
    agree(function, inputs, causal=True, window=30)
    agree(function, inputs, causal=True, bias=torch.tensor([0.1], device=device))
    bias = torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(5)).to(device).requires_grad_()
    agree(function, tensors(device, (2, 4, 8, 16), (2, 2, 9, 16)), bias=bias)


def test_the_shipped_kernels_pass(device):
    thorough(flash_attention, device)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_copy_fails(device, mutant, name):
    broken = mutant("flash_attention", *MUTANTS[name])
    with pytest.raises((AssertionError, IndexError)):
        thorough(broken.flash_attention, device)


def test_causal_attention_is_tuned_for_itself():
    """Half the tiles and an edge in every row: what is fastest for one need not be for the other."""
    for kernel in (module._forward, module._backward_keys, module._backward_queries):
        assert {"AHEAD", "BEHIND"} <= set(kernel.keys)

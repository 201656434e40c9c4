"""linear_cross_entropy: loss and gradients against stored logits, what it allocates, and broken copies to be caught."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.linear_cross_entropy as shipped
from kernels import INTERPRET
from kernels.linear_cross_entropy import linear_cross_entropy, reference

SHAPES = [(1, 1, 1), (7, 63, 5), (65, 130, 17), (3, 300, 64)]


def draw(n, v, d, device, dtype=torch.float32, ignore=-100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (v, d)))
    targets = torch.randint(v, (n,), generator=generator)
    targets[1::4] = ignore
    return x.to(device, dtype), weight.to(device, dtype), targets.to(device)


def shrink(module, monkeypatch):
    """Blocks of 32 tokens by 48 words, tiles of 16: a small problem then has several of each (interpreter only)."""
    if not INTERPRET:
        pytest.skip("on a GPU the tiles are tuned")
    for name, value in {"TOKENS": 32, "WORDS": 48, "BLOCK_WORDS": 16}.items():
        monkeypatch.setattr(module, name, value)
    for kernel in (module._forward, module._slope):
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
            monkeypatch.setitem(kernel.configs[0].kwargs, name, 16)


@pytest.fixture
def small(monkeypatch):
    shrink(shipped, monkeypatch)


@pytest.mark.parametrize("n, v, d", SHAPES)
def test_loss_and_gradients(n, v, d, device, as_exact_as_torch):
    as_exact_as_torch(linear_cross_entropy, reference, *draw(n, v, d, device), wrt=(0, 1), factor=3)


@pytest.mark.parametrize("n, v, d", [(70, 110, 20), (33, 48, 16), (5, 97, 33)])
def test_many_blocks(n, v, d, device, as_exact_as_torch, small):
    """Three times torch's error: exp(logit - log sum exp) carries the rounding of the logarithm."""
    as_exact_as_torch(linear_cross_entropy, reference, *draw(n, v, d, device), wrt=(0, 1), factor=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device, as_exact_as_torch):
    as_exact_as_torch(linear_cross_entropy, reference, *draw(40, 130, 65, device, dtype), wrt=(0, 1))


@pytest.mark.parametrize("ignore", [-100, 0, 3])
def test_ignored_tokens(ignore, device, small):
    x, weight, targets = draw(20, 60, 8, device, ignore=ignore)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    found, wanted = (f(x, weight, targets, ignore_index=ignore) for f in (linear_cross_entropy, reference))
    torch.testing.assert_close(found, wanted)
    (dx, dw), wanted = (torch.autograd.grad(loss, (x, weight)) for loss in (found, wanted))
    torch.testing.assert_close((dx, dw), wanted)
    assert dx[targets == ignore].abs().max() == 0


def test_no_token_counts(device):
    x, weight, targets = draw(5, 7, 3, device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    for rows in (slice(0, 0), slice(0, 5)):
        loss = linear_cross_entropy(x[rows], weight, torch.full_like(targets, -100)[rows])
        assert loss.isnan()
        assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss, (x, weight)))


def test_a_target_that_is_no_word_is_seen(device):
    x, weight, targets = draw(5, 7, 3, device)
    targets[0] = 7
    assert linear_cross_entropy(x, weight, targets).isnan()


def test_gradcheck(gradcheck):
    x, weight, targets = draw(3, 5, 4, "cpu", torch.float64)
    loss = lambda x, weight: linear_cross_entropy(x, weight, targets)
    assert gradcheck(loss, x.requires_grad_(), weight.requires_grad_())


def test_gradcheck_over_blocks(gradcheck, monkeypatch, small):
    monkeypatch.setattr(shipped, "TOKENS", 2)
    monkeypatch.setattr(shipped, "WORDS", 16)
    x, weight, targets = draw(3, 18, 2, "cpu", torch.float64)
    loss = lambda x, weight: linear_cross_entropy(x, weight, targets)
    assert gradcheck(loss, x.requires_grad_(), weight.requires_grad_(), fast_mode=True)


def test_leading_dimensions_and_any_strides(device):
    x, weight, targets = draw(24, 30, 8, device)
    x = x.view(4, 6, 8).transpose(0, 1).detach().requires_grad_()
    weight = weight.t().contiguous().t().requires_grad_()
    targets = targets.view(6, 4).t().contiguous().t()
    found, wanted = linear_cross_entropy(x, weight, targets), reference(x, weight, targets)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (x, weight)), torch.autograd.grad(wanted, (x, weight)))


def test_large_logits(device):
    """A softmax without the maximum taken out would overflow here; words of weight zero are no trouble either."""
    x, weight, targets = draw(9, 40, 8, device)
    x, weight = (x * 40).requires_grad_(), (weight * 40).requires_grad_()
    found, wanted = linear_cross_entropy(x, weight, targets), reference(x, weight, targets)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (x, weight)), torch.autograd.grad(wanted, (x, weight)))


def test_small_gradients_survive_half_precision(device):
    """The slope is stored before it is divided by the number of tokens: softmax / n may be too small for fp16."""
    x, weight, targets = draw(400, 300, 8, device, torch.float16)
    weight = (weight * 0.01).requires_grad_()
    (found,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), weight)
    exact = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(x.double(), exact, targets), exact)
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 2e-3


def test_the_same_twice_and_scaled(device, small):
    x, weight, targets = draw(40, 100, 8, device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    first, second = (torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight)) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    third = torch.autograd.grad(3 * linear_cross_entropy(x, weight, targets), (x, weight))
    torch.testing.assert_close(third, tuple(3 * g for g in first))


def test_only_the_gradient_that_is_asked_for(device, small, monkeypatch):
    x, weight, targets = draw(20, 60, 8, device)
    launches = []
    multiply = shipped.product
    monkeypatch.setattr(shipped, "product", lambda *args, **options: launches.append(1) or multiply(*args, **options))
    linear_cross_entropy(x.requires_grad_(), weight, targets).backward()
    assert len(launches) == 2 and weight.grad is None and x.grad is not None  # two blocks of words, one of tokens


class Sizes(TorchDispatchMode):
    """Records the bytes of the storage behind every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def largest(function, n, v, d, device):
    """Bytes of the largest tensor in forward and backward."""
    x, weight, targets = draw(n, v, d, device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with Sizes() as sizes:
        torch.autograd.grad(function(x, weight, targets), (x, weight))
    return sizes.largest


@pytest.mark.parametrize("n, v, d", [(96, 400, 4), (40, 1600, 4)])
def test_no_tensor_holds_the_logits(n, v, d, device, monkeypatch):
    monkeypatch.setattr(shipped, "TOKENS", 32)
    monkeypatch.setattr(shipped, "WORDS", 200)
    assert largest(reference, n, v, d, device) >= 4 * n * v  # the measurement sees what it should
    bound = 4 * max(n * d, v * d, shipped.TOKENS * shipped.WORDS, 2 * n)
    assert largest(linear_cross_entropy, n, v, d, device) <= bound < 4 * n * v / 5


def test_what_is_kept_for_backward(device):
    x, weight, targets = draw(20, 300, 4, device)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    assert sorted(sizes) == sorted([x.numel(), weight.numel(), 20, 20, 1])


@pytest.mark.parametrize(
    "x, weight, targets, message",
    [
        ((4, 3), (5, 2), (4,), r"x \(4, 3\), weight \(5, 2\)"),
        ((4, 3), (5, 3), (3,), r"targets \(3,\): x needs targets \(4,\)"),
        ((4, 3), (2, 5, 3), (4,), r"weight \(2, 5, 3\)"),
    ],
)
def test_bad_sizes(x, weight, targets, message, device):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            torch.zeros(x, device=device),
            torch.zeros(weight, device=device),
            torch.zeros(targets, dtype=torch.int64, device=device),
        )


def test_bad_dtypes(device):
    x, weight, targets = draw(4, 5, 3, device)
    with pytest.raises(ValueError, match="targets is int32; it must be int64"):
        linear_cross_entropy(x, weight, targets.int())
    with pytest.raises(ValueError, match="weight is torch.float16"):
        linear_cross_entropy(x, weight.half(), targets)


MUTANTS = {
    "the sum starts anew with each block of words": ("torch.logaddexp(lse, part.logsumexp(0))", "part.logsumexp(0)"),
    "words behind the vocabulary count": ('tl.where((word < n)[None, :], logits, float("-inf"))', "logits"),
    "the maximum is not added again": ("high + tl.log(total)", "tl.log(total)"),
    "the target is searched in the wrong block": (
        "other=-1) - first\n",
        "other=-1)\n",
    ),
    "ignored tokens pull": ("tl.where((target != ignored)[:, None], slope, 0.0)", "slope"),
    "softmax without the one at the target": ("((target - first)[:, None] == word[None, :]).to(ACC)", "0.0"),
    "dx of the last block only": ("add_to=dx[part])", "add_to=dx[part].zero_())"),
    "divided by all tokens": ("counts = targets != ignored", "counts = targets == targets"),
    "no mask along d": ("tl.load(x, mask=inner[None, :] < d - start, other=0.0)", "tl.load(x)"),
}


def small_problem(function, device, as_exact_as_torch):
    as_exact_as_torch(function, reference, *draw(35, 75, 20, device), wrt=(0, 1), factor=3)


def test_the_shipped_kernel_passes(device, as_exact_as_torch, small):
    small_problem(linear_cross_entropy, device, as_exact_as_torch)


@pytest.mark.parametrize("change", MUTANTS)
def test_a_broken_kernel_is_caught(change, mutant, device, as_exact_as_torch, monkeypatch):
    broken = mutant("linear_cross_entropy", *MUTANTS[change])
    shrink(broken, monkeypatch)
    with pytest.raises(Exception, match="is off by|not finite|outside every tensor"):
        small_problem(broken.linear_cross_entropy, device, as_exact_as_torch)


def test_benchmark_runs(device):
    (entry,) = shipped.benchmarks()
    size = {"tokens": 20, "words": 70, "width": 17}
    inputs = entry["inputs"](size, torch.float32, device)
    torch.testing.assert_close(entry["ours"](*inputs), entry["reference"](*inputs))
    assert entry["backward_flops"](size) == 3 * entry["flops"](size) == 6 * 20 * 70 * 17

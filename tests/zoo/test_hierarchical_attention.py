"""Chapter 13: every mechanism against its definition on random shapes, published code, and a broken twin."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tfkit import contracts, measure
from tfkit.zoo import hierarchical_attention as z
from tfkit.zoo.attention import MultiHeadAttention, attention, padding_mask

seeds = pytest.mark.parametrize("seed", [0, 1, 2])
SHAPES = [(1, 1, 2, 4, 3), (2, 3, 4, 5, 8), (3, 2, 3, 8, 4)]  # batch, heads, blocks, block, head width
shapes = pytest.mark.parametrize("b, h, blocks, block, e", SHAPES)


def qkv(b, h, n, e):
    return torch.randn(3, b, h, n, e).unbind(0)


# ----------------------------------------------------------------------------------------------------------------- mra


def written_out(q, k, v, refine, block, choose=z.best_blocks, spread=lambda low: low):
    """MRA-2 with all n x n entries."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    low = scores.unflatten(3, (-1, block)).unflatten(2, (-1, block)).mean((3, 5))
    chosen = torch.zeros_like(low, dtype=torch.bool).flatten(2)
    chosen = chosen.scatter(2, choose(low, refine), True).view_as(low)
    grow = lambda t: t.repeat_interleave(block, 2).repeat_interleave(block, 3)
    weights = torch.where(grow(chosen), scores, grow(spread(low))).softmax(-1)
    return weights @ v


@seeds
@shapes
def test_mra_equals_its_definition_at_every_budget(b, h, blocks, block, e, seed):
    torch.manual_seed(seed)
    q, k, v = qkv(b, h, blocks * block, e)
    for refine in range(blocks + 1):
        ours = z.mra_attention(3 * q, k, v, refine=refine, block=block)
        torch.testing.assert_close(ours, written_out(3 * q, k, v, refine, block), atol=1e-5, rtol=1e-4)
    assert contracts.reduces_to(partial(z.mra_attention, refine=blocks, block=block), attention, q, k, v, atol=1e-4)


@shapes
def test_mra_check_finds_broken_twins(b, h, blocks, block, e):
    torch.manual_seed(0)
    q, k, v = qkv(b, h, blocks * block, e)
    ours = z.mra_attention(3 * q, k, v, refine=1, block=block)
    dropped = written_out(3 * q, k, v, 1, block, spread=lambda low: low - 1e9)  # MRA-2-s
    assert not torch.allclose(ours, dropped, atol=1e-3)
    worst = lambda low, refine: z.best_blocks(-low, refine)
    assert not torch.allclose(ours, written_out(3 * q, k, v, 1, block, choose=worst), atol=1e-3)


@seeds
def test_mra_padding(seed):
    torch.manual_seed(seed)
    q, k, v = qkv(2, 2, 24, 4)
    real = torch.arange(24)[None] < torch.tensor([[24], [9]])
    mask = padding_mask(real)
    full = z.mra_attention(q, k, v, mask, refine=6, block=4)
    rows = real[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(full[rows], attention(q, k, v, mask)[rows], atol=1e-5, rtol=1e-4)
    some = z.mra_attention(q, k, v, mask, refine=2, block=4)
    junk = [torch.where(real[:, None, :, None], t, 9 * torch.randn_like(t)) for t in (q, k, v)]
    torch.testing.assert_close(some[rows], z.mra_attention(*junk, mask, refine=2, block=4)[rows], atol=1e-5, rtol=1e-4)


def test_mra_survives_large_scores_and_has_gradients():
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 32, 4))
    out = z.mra_attention(300 * q, k, v, refine=1, block=8)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    small = [t.detach().double().requires_grad_() for t in qkv(1, 1, 8, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: z.mra_attention(q, k, v, refine=1, block=2), small)


def cuda_kernels_in_torch():
    """What the three CUDA kernels of `transformers`' MRA compute: blocks of 32, stored keys down, queries across."""

    def pick(blocks, number):  # (b, N, e, w), (b, R) -> (b, R, e, w)
        return blocks.gather(1, number.long()[..., None, None].expand(-1, -1, *blocks.shape[2:]))

    def mm_to_sparse(query, key, indices):
        return pick(key, indices % key.shape[1]).mT @ pick(query, indices // key.shape[1])

    def sparse_dense_mm(sparse, indices, dense, rows):
        parts = pick(dense, indices % dense.shape[1]) @ sparse  # (b, R, e, w)
        number = (indices // dense.shape[1]).long()[..., None, None].expand_as(parts)
        return parts.new_zeros(len(parts), rows, *parts.shape[2:]).scatter_add(1, number, parts)

    def index_max(values, indices, rows, columns):  # (b, w, R)
        number = (indices // columns).long()[:, None].expand_as(values)
        top = values.new_full((len(values), 32, rows), -1e30).scatter_reduce(2, number, values, "amax")
        return top.mT.flatten(1), top.gather(2, number)

    return SimpleNamespace(mm_to_sparse=mm_to_sparse, sparse_dense_mm=sparse_dense_mm, index_max=index_max)


@pytest.mark.parametrize("refine", [1, 2, 4])
def test_mra_parity_with_transformers(monkeypatch, refine):
    """The published two-level algorithm; only its CUDA kernels are replaced by what they compute."""
    theirs = pytest.importorskip("transformers.models.mra.modeling_mra")
    monkeypatch.setattr(theirs, "mra_cuda_kernel", cuda_kernels_in_torch())
    torch.manual_seed(refine)
    q, k, v = qkv(2, 2, 128, 8)
    wanted = theirs.mra2_attention(2 * q, k, v, None, refine * 4, "full")
    ours = z.mra_attention(2 * q, k, v, refine=refine, block=32)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    sparse = theirs.mra2_attention(2 * q, k, v, None, refine * 4, "sparse")
    assert refine == 4 or not torch.allclose(ours, sparse, atol=1e-3)  # without the coarse part it is another layer


def test_mra_errors():
    q, k, v = qkv(1, 1, 8, 2)
    with pytest.raises(ValueError, match="8 tokens .* blocks of 3"):
        z.mra_attention(q, k, v, block=3)
    with pytest.raises(ValueError, match="0 to 2 blocks per row, got 3"):
        z.mra_attention(q, k, v, refine=3, block=4)
    with pytest.raises(ValueError, match="4 and 8"):
        z.mra_attention(q[:, :, :4], k, v)
    with pytest.raises(ValueError, match="padding masks"):
        z.mra_attention(q, k, v, torch.ones(8, 8, dtype=torch.bool), refine=1, block=4)


# --------------------------------------------------------------------------------------------------------------- ponet


def ponet_by_loops(layer, x, segments, pick=max):
    out = torch.empty_like(x)
    h = layer.heads
    for b in range(len(x)):
        q, k, own, piece, near = layer.project(x[b]).chunk(5, -1)
        n = len(q)
        summary = []
        for head in range(h):
            cut = slice(head * q.shape[1] // h, (head + 1) * q.shape[1] // h)
            weights = (q[:, cut].mean(0) @ k[:, cut].T / math.sqrt(q.shape[1] / h)).softmax(-1)
            summary.append(weights @ k[:, cut])
        for i in range(n):
            same = torch.stack([piece[j] for j in range(n) if segments[b, j] == segments[b, i]])
            half = layer.window // 2
            close = near[max(0, i - half) : i + half + 1]
            best = same.amax(0) if pick is max else same.mean(0)
            out[b, i] = layer.to_out((torch.cat(summary) + best) * own[i] + close.amax(0))
    return out


@seeds
@pytest.mark.parametrize("width, heads, n, segment, window", [(8, 2, 7, 3, 3), (12, 3, 10, 5, 5), (6, 1, 4, 9, 1)])
def test_ponet_equals_loops(width, heads, n, segment, window, seed):
    torch.manual_seed(seed)
    layer, x = z.PoNet(width, heads, segment, window), torch.randn(2, n, width)
    fixed = (torch.arange(n) // segment).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), ponet_by_loops(layer, x, fixed), atol=1e-5, rtol=1e-4)
        sentences = (torch.rand(2, n) < 0.3).cumsum(1)
        ours = layer(x, segments=sentences)
        torch.testing.assert_close(ours, ponet_by_loops(layer, x, sentences), atol=1e-5, rtol=1e-4)
        broken = ponet_by_loops(layer, x, torch.zeros_like(fixed), pick=None)
        assert not torch.allclose(layer(x), broken, atol=1e-3)


def test_ponet_padding_and_errors():
    layer, x = z.PoNet(8, 2, segment=4), torch.randn(2, 12, 8)
    real = torch.arange(12)[None] < torch.tensor([[12], [5]])
    assert contracts.padding_invariant(lambda t, r: layer(t, padding_mask(r)), x, real)
    assert not contracts.padding_invariant(lambda t, r: layer(t), x, real)
    with pytest.raises(ValueError, match="width 8 .* 3 heads"):
        z.PoNet(8, 3)
    with pytest.raises(ValueError, match="odd, got 4"):
        z.PoNet(8, 2, window=4)
    with pytest.raises(ValueError, match="got 2"):
        z.window_max(x, 2)
    with pytest.raises(ValueError, match="got 0"):
        z.segment_max(x, 0)


# ----------------------------------------------------------------------------------------------------------- multipole


def mano(layer, x, size):
    """The published recipe with loops over windows."""

    def look(grid):
        out = torch.zeros_like(grid)
        w = layer.window
        for i in range(0, grid.shape[2], w):
            for j in range(0, grid.shape[3], w):
                tokens = grid[:, :, i : i + w, j : j + w].flatten(2).mT
                mixed = layer.near(layer.norm(tokens))
                out[:, :, i : i + w, j : j + w] = mixed.mT.unflatten(2, (w, w))
        return out

    grid = x.mT.unflatten(2, size)
    floors = [look(grid)]
    for _ in range(1, layer.levels):
        grid = F.conv2d(grid, layer.down.weight, stride=2)
        floors.append(look(grid))
    result = floors.pop()
    for step, floor in enumerate(floors[::-1]):
        result = floor + F.conv_transpose2d(result, layer.up.weight, stride=2) / (step + 1)
    return result.flatten(2).mT


@seeds
@pytest.mark.parametrize("size, window, levels", [((8, 8), 2, 3), ((4, 8), 4, 1), ((12, 8), 2, 2)])
def test_multipole_attention_equals_loops(size, window, levels, seed):
    torch.manual_seed(seed)
    layer = z.MultipoleAttention(8, 2, window, levels, size)
    x = torch.randn(2, size[0] * size[1], 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), mano(layer, x, size), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape, window", [((2, 3, 12), 4), ((1, 2, 4, 6), 2), ((3, 1, 9, 3), 3)])
def test_windows_there_and_back(shape, window):
    grid = torch.randn(shape)
    assert torch.equal(z.from_windows(z.to_windows(grid, window), window, shape[2:]), grid)


def test_multipole_attention_reach_and_limits():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 8)
    everyone = torch.ones(32, 32, dtype=torch.bool)
    assert contracts.structured(z.MultipoleAttention(8, 2, 8, 3), x, everyone)
    assert not contracts.structured(z.MultipoleAttention(8, 2, 4, 3), x, everyone)  # its top has two windows
    flat = z.MultipoleAttention(8, 2, 8, 1)
    assert contracts.block_structured(flat, x, torch.arange(32) // 8)
    whole = z.MultipoleAttention(8, 2, 32, 1)
    assert contracts.agree(whole, lambda t: whole.near(whole.norm(t)), x)
    counts = {measure.parameters(z.MultipoleAttention(8, 2, 4, levels)) for levels in (2, 3, 5)}
    assert len(counts) == 1


def test_multipole_attention_padding_and_errors():
    torch.manual_seed(0)
    layer, x = z.MultipoleAttention(8, 2, 4, 2), torch.randn(2, 16, 8)
    real = torch.arange(16)[None] < torch.tensor([[16], [5]])
    noise = torch.where(real.unsqueeze(-1), x, torch.randn_like(x))
    mask = padding_mask(real)
    torch.testing.assert_close(layer(x, mask)[real], layer(noise, mask)[real])
    assert not torch.allclose(layer(x)[real], layer(noise)[real])
    with pytest.raises(ValueError, match="at least 1 level, got 0"):
        z.MultipoleAttention(8, 2, levels=0)
    with pytest.raises(ValueError, match=r"\(6,\) does not divide into windows of 4"):
        z.to_windows(torch.randn(1, 8, 6), 4)
    with pytest.raises(ValueError, match=r"12 tokens .* \(12,\) do not make 2 levels of windows of 4"):
        layer(torch.randn(1, 12, 8))
    with pytest.raises(ValueError, match=r"12 tokens on a grid of \(4, 4\)"):
        z.MultipoleAttention(8, 2, 4, 1, (4, 4))(torch.randn(1, 12, 8))


# ----------------------------------------------------------------------------------------------------------------- fit


def fit_by_loops(layer, x):
    """Each group by itself, and latents with a list of what they may see."""
    causal = layer.order is z.PastOnly
    groups = x.split(layer.group, 1)
    near = [layer.local(g) for g in groups]
    latents = [layer.latents.expand(len(x), -1, -1) for _ in groups]
    latents = [t + layer.read(t, g) for t, g in zip(latents, near, strict=True)]
    seen = []
    for i, t in enumerate(latents):
        q = layer.share.project(t)[0]
        keys = torch.cat(latents[: i + 1] if causal else latents, 1)
        _, k, v = layer.share.project(keys)
        mixed = layer.share.to_out(attention(q, k, v).transpose(1, 2).flatten(2))
        seen.append(t + mixed)
    if causal:
        seen = [torch.zeros_like(seen[0]), *seen[:-1]]
    return torch.cat([g + layer.write(g, t) for g, t in zip(near, seen, strict=True)], 1)


@seeds
@pytest.mark.parametrize("order", [z.TwoWay, z.PastOnly])
@pytest.mark.parametrize("groups, group, latents", [(1, 4, 2), (3, 5, 1), (4, 2, 3)])
def test_fit_interleaved_equals_loops(groups, group, latents, order, seed):
    torch.manual_seed(seed)
    layer = z.InterleavedAttention(8, 2, group, latents, order)
    x = torch.randn(2, groups * group, 8)
    torch.testing.assert_close(layer(x), fit_by_loops(layer, x), atol=1e-5, rtol=1e-4)


@seeds
def test_fit_interleaved_causality(seed):
    torch.manual_seed(seed)
    x = torch.randn(1, 12, 8)
    parts = {"groups": 3, "latents": 2}

    class Leaky(z.PastOnly):
        hand = staticmethod(z.TwoWay.hand)

    class Peeking(z.PastOnly):
        sight = staticmethod(z.TwoWay.sight)

    for make in (partial(z.InterleavedAttention, group=4, latents=2), partial(z.FIT, **parts)):
        assert contracts.causal(make(8, 2, order=z.PastOnly), x)
        for broken in (Leaky, Peeking, z.TwoWay):
            assert not contracts.causal(make(8, 2, order=broken), x)


@seeds
def test_fit_interleaved_limits(seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 12, 8)
    alone = z.InterleavedAttention(8, 2, group=12, latents=0)
    assert contracts.agree(alone, alone.local, x)
    plain = z.FIT(8, 2, groups=1, latents=1, blocks=0)
    assert contracts.agree(plain, lambda t: plain.norm(plain.last(t)), x)
    assert contracts.structured(z.FIT(8, 2, groups=3, latents=1), x, torch.ones(12, 12, dtype=torch.bool))


def test_fit_interleaved_cost_and_errors():
    for length in (1000, 30000):
        for m in (1, 4):
            best = min(range(1, 2000), key=lambda n, L=length, m=m: z.interleaved_cost(L, n, m))
            assert abs(best - z.best_group(length, m)) < 1
    ratio = z.interleaved_cost(8000, z.best_group(8000, 2), 2) / z.interleaved_cost(1000, z.best_group(1000, 2), 2)
    assert ratio == pytest.approx(16)
    with pytest.raises(ValueError, match="12 tokens do not divide into groups of 5"):
        z.InterleavedAttention(8, 2, group=5)(torch.randn(1, 12, 8))
    with pytest.raises(ValueError, match="12 tokens do not make 5 equal groups"):
        z.FIT(8, 2, groups=5, latents=1)(torch.randn(1, 12, 8))


def test_fit_interleaved_padding():
    torch.manual_seed(0)
    layer, x = z.InterleavedAttention(8, 2, group=4, latents=2), torch.randn(2, 16, 8)
    real = torch.arange(16)[None] < torch.tensor([[16], [6]])
    noise = torch.where(real.unsqueeze(-1), x, torch.randn_like(x))
    mask = padding_mask(real)
    torch.testing.assert_close(layer(x, mask)[real], layer(noise, mask)[real])
    short = layer(x[1:, :8], padding_mask(real[1:, :8]))
    torch.testing.assert_close(layer(x[1:], padding_mask(real[1:]))[:, :6], short[:, :6])


# ----------------------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("name", ["MRA", "PoNet", "multipole", "interleaved"])
def test_work_and_memory_grow_linearly(name):
    sizes = [512, 1024, 2048]
    module = z.mechanisms[name]()[0]
    plain = MultiHeadAttention(64, 4)
    x = lambda n: torch.randn(1, n, 64)
    assert measure.growth(sizes, [measure.flops(module, x(n)) for n in sizes]).exponent < 1.3
    assert measure.growth(sizes, [measure.flops(plain, x(n)) for n in sizes]).exponent > 1.5
    memory = [measure.peak_bytes(module, x(n)) for n in (512, 2048)]
    assert memory[1] / memory[0] < 6  # 16 for a table of all pairs


@pytest.mark.parametrize("name", list(z.mechanisms))
def test_mechanisms_are_layers(name):
    module, (x,) = z.mechanisms[name]()
    assert module(x[:1]).shape == x[:1].shape
    real = torch.arange(128)[None] < 100
    if name != "plain attention":
        assert module(x[:1], mask=padding_mask(real)).isfinite().all()

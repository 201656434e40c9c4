"""Chapter 11: every mechanism against the map that it avoids, its limits, published code, and a broken twin."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.past import remember
from tfkit.zoo import linear_attention as z
from tfkit.zoo.attention import (
    MultiHeadAttention,
    attention,
    causal_attention,
    causal_mask,
    padding_mask,
)

SIZES = [(2, 4, 7, 8), (1, 2, 12, 4), (3, 1, 70, 6)]  # batch, heads, tokens, head width
sizes = pytest.mark.parametrize("b, h, n, e", SIZES)
FEATURES = {
    "elu": lambda e: z.elu_features,
    "relu": lambda e: z.relu_features,
    "performer": lambda e: z.RandomFeatures(e, 24),
    "cosformer": lambda e: partial(z.cosine_features, length=80),
    "taylor": lambda e: lambda x, start=0: z.taylor_features(x / 2, 2),
}
features = pytest.mark.parametrize("kind", list(FEATURES))


@pytest.fixture(params=[0, 1, 2])
def seed(request):
    torch.manual_seed(request.param)
    return request.param


def by_map(q, k, v, mask=None):
    """Weights q_i . k_j, masked (or multiplied), normalized; rows without weights give zeros."""
    weights = q @ k.mT
    weights = weights if mask is None else weights * mask
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v


# ------------------------------------------------------------------------------------------------ features: three forms


@sizes
@features
def test_two_sided_form_equals_the_map(seed, kind, b, h, n, e):
    phi = FEATURES[kind](e)
    q, k, v = torch.randn(b, h, n, e), torch.randn(b, h, n + 3, e), torch.randn(b, h, n + 3, e + 1)
    slow = lambda q, k, v: by_map(phi(q, 3), phi(k, 0), v)
    assert contracts.reduces_to(z.Featured(phi), slow, q, k, v, atol=3e-5)


@sizes
@features
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_parallel_chunked_and_recurrent_agree(seed, kind, b, h, n, e, chunk):
    phi = FEATURES[kind](e)
    q, k, v = torch.randn(3, b, h, n, e).unbind(0)
    slow = lambda q, k, v: by_map(phi(q, 0), phi(k, 0), v, causal_mask(n))
    chunked = z.Featured(phi, partial(z.causal_feature_attention, chunk=chunk))
    assert contracts.reduces_to(chunked, slow, q, k, v, atol=3e-5)
    with remember(chunked):
        pieces = [chunked(*piece) for piece in zip(*(t.split([2, 1, n - 3], -2) for t in (q, k, v)), strict=True)]
    assert torch.allclose(torch.cat(pieces, -2), slow(q, k, v), atol=3e-5)
    last = chunked(q[..., -2:, :], k, v)
    assert torch.allclose(last, slow(q, k, v)[..., -2:, :], atol=3e-5)


def test_a_chunk_that_sees_itself_twice_is_caught(seed, monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 20, 4).unbind(0)
    causal = z.Featured(z.elu_features, partial(z.causal_feature_attention, chunk=4))
    right = causal(q, k, v)
    pad = F.pad
    late = lambda t, by, **more: pad(t, (0, 0, 0, 0, 0, 1) if by == (0, 0, 0, 0, 1, 0) else by, **more)
    monkeypatch.setattr(z.F, "pad", late)  # states after a chunk in the place of those before it
    assert not torch.allclose(causal(q, k, v), right, atol=1e-2)


@features
def test_layers_are_causal_and_cached(seed, kind):
    layer = MultiHeadAttention(16, 2, attend=z.Featured(FEATURES[kind](8), z.causal_feature_attention))
    x = torch.randn(2, 9, 16)
    assert contracts.causal(layer, x)
    with torch.no_grad(), remember(layer):
        pieces = torch.cat([layer(piece) for piece in x.split([4, 1, 1, 3], 1)], 1)
    assert torch.allclose(pieces, layer(x), atol=1e-5)
    two_sided = MultiHeadAttention(16, 2, attend=z.Featured(FEATURES[kind](8)))
    assert not contracts.causal(two_sided, x)


@features
def test_padding_is_not_seen(seed, kind):
    layer = MultiHeadAttention(16, 2, attend=z.Featured(FEATURES[kind](8)))
    x, real = torch.randn(2, 6, 16), torch.arange(6) < torch.tensor([[6], [4]])
    assert contracts.padding_invariant(lambda x, real: layer(x, padding_mask(real)), x, real)
    assert not contracts.padding_invariant(lambda x, real: layer(x), x, real)


def test_wrong_masks_and_lengths_are_refused():
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind(0)
    with pytest.raises(ValueError, match="once for all queries"):
        z.feature_attention(q, k, v, causal_mask(5))
    with pytest.raises(ValueError, match=r"got \(1, 4\)"):
        z.feature_attention(q, k, v, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="got 3"):
        z.causal_feature_attention(q, k[..., :3, :], v[..., :3, :])
    with pytest.raises(ValueError, match="got 0"):
        z.RandomFeatures(4, 0)


def test_random_features_are_unbiased_and_orthogonal(seed):
    w = z.orthogonal_gaussian(24, 8, seed)
    for block in w.split(8):
        products = block @ block.T
        assert torch.allclose(products, products.diag().diag(), atol=1e-4)
    q, k = torch.randn(2, 6, 8).mul(0.5).unbind(0)
    exact = (q @ k.T / 8**0.5).exp()
    draws = [z.orthogonal_gaussian(64, 8, s) for s in range(60)]
    many = torch.stack([z.softmax_features(q, w) @ z.softmax_features(k, w).T for w in draws])
    assert (many.mean(0) / exact - 1).abs().mean() < 0.04
    unscaled = z.softmax_features(2 * q, w) @ z.softmax_features(k, w).T
    assert (unscaled / exact - 1).abs().max() > 0.2


@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("chunk", [4, 32])
def test_performer_is_right_for_entries_of_any_size(seed, size, chunk):
    parts = (size * torch.randn(3, 1, 2, 40, 64, dtype=torch.float64)).unbind(0)
    exact = z.RandomFeatures(64, 96, seed).double()
    single = z.RandomFeatures(64, 96, seed)
    a, b = exact.logs(parts[0]), exact.logs(parts[1])
    logs = (a.unsqueeze(-2) + b.unsqueeze(-3)).logsumexp(-1)  # (b, h, n, n), nothing can vanish
    for allowed, average in (
        (torch.ones(40, 40, dtype=torch.bool), z.feature_attention),
        (causal_mask(40), partial(z.causal_feature_attention, chunk=chunk)),
    ):
        wanted = logs.masked_fill(~allowed, -torch.inf).softmax(-1) @ parts[2]
        found = z.Featured(single, average)(*(t.float() for t in parts))
        assert (found - wanted).norm() < 1e-3 * wanted.norm()
    loud = [t.float() for t in parts]
    loud[1] = loud[1].clone()
    loud[1][..., -1, :] = 0.0  # among large keys the one with the largest features
    assert torch.allclose(z.Featured(single, average)(*loud)[..., :-1, :], found[..., :-1, :], rtol=1e-5, atol=1e-6)
    real = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    real[..., :3] = real[..., 20:22] = False
    wanted = logs.masked_fill(~(causal_mask(40) & real), -torch.inf).softmax(-1).nan_to_num(0.0) @ parts[2]
    found = z.Featured(single, average)(*(t.float() for t in parts), real)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("n, chunk", [(1, 4), (7, 4), (16, 4), (50, None)])
def test_fading_sums_are_the_recurrence(seed, n, chunk, features):
    q, k, v = torch.randn(3, 2, 3, n, 4, dtype=torch.float64).unbind(0)
    fade, start = -3 * torch.rand(2, 3, n, features).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def loop(q, k, v, fade, state):
        outs = []
        for t in range(n):
            state = fade[..., t, :, None].exp() * state + k[..., t, :, None] * v[..., t, None, :]
            outs.append((q[..., t, None, :] @ state).squeeze(-2))
        return torch.cat([torch.stack(outs, -2).flatten(-2), state.flatten(-2)], -1)

    def ours(*given):
        out, state = z.fading_sums(*given, chunk)
        return torch.cat([out.flatten(-2), state.flatten(-2)], -1)

    assert contracts.reduces_to(ours, loop, q, k, v, fade, start, atol=1e-8)
    still, _ = z.fading_sums(q, k, v, 0 * fade, start, chunk)
    assert torch.allclose(still, z.causal_sums(q, k, v, start, chunk)[0])
    assert contracts.reduces_to(ours, loop, q, k, v, 400 * fade, start, atol=1e-8)  # nothing overflows
    one = q[:, :1], k[:, :1]  # queries and keys of one head serve all
    copied = z.fading_sums(*(t.expand_as(v) for t in one), v, fade, start, chunk)[0]
    assert torch.allclose(z.fading_sums(*one, v, fade, start, chunk)[0], copied)
    with pytest.raises(ValueError, match="4 features.*2 rates"):
        z.fading_sums(q, k, v, fade[..., :1].expand(-1, -1, -1, 2))


# ------------------------------------------------------------------------------------------------------------ cosFormer


@sizes
def test_cosformer_is_relu_times_cosine(seed, b, h, n, e):
    q, k, v = torch.randn(3, b, h, n, e).unbind(0)
    length = n + 3
    back = torch.arange(n)[:, None] - torch.arange(n)
    reweight = (math.pi / 2 * back / length).cos()
    phi = partial(z.cosine_features, length=length)
    slow = lambda q, k, v: by_map(F.relu(q), F.relu(k), v, reweight)
    assert contracts.reduces_to(z.Featured(phi), slow, q, k, v)
    assert not contracts.agree(z.Featured(z.relu_features), slow, q, k, v, atol=1e-3)
    far = partial(z.cosine_features, length=10**6)
    assert contracts.agree(z.Featured(far), z.Featured(z.relu_features), q, k, v)
    maps = z.Featured(phi)(q, k, torch.eye(n).expand(b, h, n, n))
    assert (maps >= 0).all()
    assert torch.allclose(maps.sum(-1), (F.relu(q).sum(-1) > 0).float(), atol=1e-5)
    with pytest.raises(ValueError, match=f"length M is only {n - 1}"):
        z.cosine_features(q, length=n - 1)


# --------------------------------------------------------------------------------------------------- Linformer, Nyström


@sizes
def test_linformer_with_identity_projections_is_attention(seed, b, h, n, e):
    q, k, v = torch.randn(3, b, h, n, e).unbind(0)
    attend = z.ProjectedAttention(n, n)
    with torch.no_grad():
        attend.e.copy_(torch.eye(n)), attend.f.copy_(torch.eye(n))
    assert contracts.reduces_to(attend, attention, q, k, v)
    with torch.no_grad():
        attend.f[0, 0] = 0.0
    assert not contracts.agree(attend, attention, q, k, v, atol=1e-3)


def test_linformer_leaks_and_has_low_rank(seed):
    layer, x = z.linformer_attention(16, 2, length=12, rank=3), torch.randn(2, 10, 16)
    assert not contracts.causal(layer, x)
    assert (torch.linalg.matrix_rank(layer.maps(x), rtol=1e-4) <= 3).all()
    real = torch.arange(10) < torch.tensor([[10], [7]])
    assert contracts.padding_invariant(lambda x, real: layer(x, padding_mask(real)), x[:, :10], real)
    with pytest.raises(ValueError, match="12 keys, got 13"):
        layer(torch.randn(1, 13, 16))
    with pytest.raises(ValueError, match="between 1 and 12, got 13"):
        z.ProjectedAttention(12, 13)
    with pytest.raises(ValueError, match="once for all queries"):
        layer(x, causal_mask(10))
    shared = layer.attend
    two = nn.ModuleList(MultiHeadAttention(16, 2, attend=shared) for _ in range(2))
    assert measure.parameters(two) == 2 * measure.parameters(MultiHeadAttention(16, 2)) + 2 * 3 * 12


def test_nystrom_with_every_token_a_landmark_is_attention(seed):
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64).unbind(0)
    exact = partial(z.nystrom_attention, rank=9, inverse=torch.linalg.pinv)
    assert contracts.agree(exact, attention, q, k, v)
    assert not contracts.agree(partial(z.nystrom_attention, rank=3), attention, q, k, v, atol=1e-3)
    a = torch.randn(2, 5, 5, dtype=torch.float64).softmax(-1) + torch.eye(5)
    assert torch.allclose(z.iterated_inverse(a, 30), torch.linalg.pinv(a), atol=1e-6)
    with pytest.raises(ValueError, match="10 landmarks for 9 by 9"):
        z.nystrom_attention(q, k, v, 10)
    with pytest.raises(ValueError, match="once for all queries"):
        z.NystromAttention(3)(q, k, v, causal_mask(9))


def test_nystrom_equals_transformers(seed):
    code = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    config = code.NystromformerConfig(
        hidden_size=24, num_attention_heads=4, num_landmarks=4, segment_means_seq_len=12, conv_kernel_size=3,
    )  # fmt: skip
    theirs = code.NystromformerSelfAttention(config).eval()
    theirs.init_option = "exact"  # the other one looks at all texts of the batch
    ours = MultiHeadAttention(24, 4, attend=z.NystromAttention(4, convolve=z.ValueConvolution(4, 3)))
    three = [theirs.query, theirs.key, theirs.value]
    with torch.no_grad():
        ours.attend.convolve.weight.copy_(theirs.conv.weight)
        ours.to_qkv.weight.copy_(torch.cat([part.weight for part in three]))
        ours.to_qkv.bias.copy_(torch.cat([part.bias for part in three]))
        ours.to_out.weight.copy_(torch.eye(24)), ours.to_out.bias.zero_()
    x = torch.randn(2, 12, 24)
    assert contracts.agree(ours, lambda x: theirs(x)[0], x)
    ours.attend.rank = 6
    assert not contracts.agree(ours, lambda x: theirs(x)[0], x, atol=1e-4)
    with pytest.raises(ValueError, match="odd size; got 4"):
        z.ValueConvolution(4, 4)


def test_nystrom_padding_is_not_there(seed):
    layer = MultiHeadAttention(16, 2, attend=z.NystromAttention(3, convolve=z.ValueConvolution(2, 5)))
    x, real = torch.randn(2, 9, 16), torch.tensor([[True] * 9, [False] * 2 + [True] * 6 + [False]])
    padded = lambda x, real: layer(x, padding_mask(real))
    assert contracts.padding_invariant(padded, x, real)
    assert not contracts.padding_invariant(lambda x, real: layer(x), x, real)
    assert torch.allclose(padded(x, real)[1, 2:8], layer(x[1:, 2:8])[0], atol=1e-5)
    assert torch.allclose(padded(x, real | True), layer(x), atol=1e-5)
    assert padded(x, real & False).isfinite().all()
    assert torch.allclose(layer(x)[:1], layer(x[:1]), atol=1e-6)  # texts of a batch do not touch


# ------------------------------------------------------------------------------------------------------------------ AFT


def aft_by_softmax(k, v, w):
    past = causal_mask(k.shape[-2])[..., None]
    scores = (k[..., None, :, :] + w[..., None]).masked_fill(~past, -torch.inf)
    return (scores.softmax(-2) * v[..., None, :, :]).sum(-2)


@pytest.mark.parametrize("b, n, d, window", [(2, 9, 5, 4), (1, 16, 3, 1), (3, 7, 2, 7), (1, 13, 4, 20), (2, 5, 3, 0)])
def test_aft_averages_equal_the_softmax_form(seed, b, n, d, window):
    k, v = torch.randn(2, b, n, d).unbind(0)
    rows, columns = torch.randn(2, n, 3).unbind(0)
    w, back = rows @ columns.T, torch.arange(n)[:, None] - torch.arange(n)
    local = lambda k, v: z.local_average(k, v, rows, columns, window)
    near = w * (back < window)
    assert contracts.reduces_to(local, lambda k, v: aft_by_softmax(k, v, near), k, v, atol=5e-5)
    full = lambda k, v: z.full_average(k, v, w)
    assert contracts.reduces_to(full, lambda k, v: aft_by_softmax(k, v, w), k, v, atol=2e-5)
    assert contracts.reduces_to(z.simple_average, lambda k, v: aft_by_softmax(k, v, 0 * w), k, v, atol=2e-5)
    if 0 < window < n - 1:
        assert not contracts.agree(local, lambda k, v: aft_by_softmax(k, v, w), k, v, atol=1e-3)


def test_aft_simple_equals_rwkv_without_decay(seed):
    code = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    k, v = torch.randn(2, 2, 8, 5).unbind(0)
    theirs, _ = code.rwkv_linear_attention_cpu(torch.full((5,), -torch.inf), torch.zeros(5), k, v)
    assert torch.allclose(z.simple_average(k, v), theirs, atol=1e-5)


@pytest.mark.parametrize("make", [z.SimpleAverage, lambda: z.FullBias(12), lambda: z.LocalBias(12, 4)])
def test_aft_layers(seed, make):
    layer, x = z.AFT(16, make()), torch.randn(2, 10, 16)
    assert contracts.causal(layer, x)
    assert contracts.gradients_reach(layer, x)
    flat = lambda k, v: v.mean(-2, keepdim=True).expand_as(v)
    assert not contracts.causal(z.AFT(16, flat), x)
    real = torch.tensor([[True] * 10, [False] * 2 + [True] * 6 + [False] * 2])
    assert contracts.padding_invariant(lambda x, real: layer(x, padding_mask(real)), x, real)
    assert layer(x, padding_mask(real & False)).isfinite().all()
    with pytest.raises(ValueError, match="padding mask"):
        layer(x, torch.ones(1, 10, dtype=torch.bool))
    if make is not z.SimpleAverage:
        with pytest.raises(ValueError, match="12 positions, got 13"):
            layer(torch.randn(1, 13, 16))


@pytest.mark.parametrize("name", ["simple", "full", "local"])
def test_aft_is_right_for_keys_of_very_different_size(seed, name):
    k, v = torch.randn(2, 2, 11, 5).unbind(0)
    k[:, 3] += 90.0
    k[:, -1] += 400.0  # in 32 bits all others would be zero beside it
    rows, columns = torch.randn(2, 11, 3).unbind(0)
    w, back = rows @ columns.T, torch.arange(11)[:, None] - torch.arange(11)
    w[:, -1] += 200.0 * (torch.arange(11) < 10)  # biases of the future
    make = {
        "simple": (z.simple_average, 0 * w),
        "full": (lambda k, v: z.full_average(k, v, w), w),
        "local": (lambda k, v: z.local_average(k, v, rows, columns, 4), rows @ columns.T * (back < 4)),
    }
    average, bias = make[name]
    assert contracts.reduces_to(average, lambda k, v: aft_by_softmax(k, v, bias), k, v, atol=5e-5)
    quiet = k.clone()
    quiet[:, -1] = 0.0
    assert torch.allclose(average(k, v)[:, :-1], average(quiet, v)[:, :-1], atol=1e-6)


def test_aft_conv(seed):
    q, v = torch.randn(2, 2, 3, 4, 6, 7).unbind(0)
    k, w = torch.randn(2, 3, 6, 7), torch.randn(3, 3, 3)
    torus = partial(F.pad, mode="circular")
    shift = lambda t: t.roll((2, 3), (-2, -1))
    moved = z.aft_conv(shift(q), shift(k), shift(v), w, torus)
    assert torch.allclose(moved, shift(z.aft_conv(q, k, v, w, torus)), atol=1e-5)
    assert not torch.allclose(z.aft_conv(shift(q), shift(k), shift(v), w), shift(z.aft_conv(q, k, v, w)), atol=1e-3)
    i, j = 2, 5  # one pixel, summed by hand
    top, bottom = 0.0, 0.0
    for y in range(6):
        for x in range(7):
            inside = abs(y - i) <= 1 and abs(x - j) <= 1
            bias = w[:, y - i + 1, x - j + 1] if inside else torch.zeros(3)
            a = (k[:, :, y, x] + bias).exp()[..., None]
            top, bottom = top + a * v[..., y, x], bottom + a
    expected = q[..., i, j].sigmoid() * top / bottom
    assert torch.allclose(z.aft_conv(q, k, v, w)[..., i, j], expected, atol=1e-5)
    with pytest.raises(ValueError, match="odd size; got 4"):
        z.aft_conv(q, k, v, torch.randn(3, 4, 4))
    with pytest.raises(ValueError, match="got -1"):
        z.local_average(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1), -1)


# ---------------------------------------------------------------------------------------------------------------- trees


def random_tree(n, seed, reach=30):
    g = torch.Generator().manual_seed(seed)
    i = torch.arange(1, n)
    return torch.stack([i - 1 - (torch.rand(n - 1, generator=g) * i.clamp(max=reach)).long(), i], 1)


def all_distances(edges, lengths):
    d = torch.zeros(len(edges) + 1, len(edges) + 1)
    for (parent, i), w in zip(edges.tolist(), lengths.tolist(), strict=True):
        d[i, :i] = d[:i, i] = d[parent, :i] + w
    return d


@pytest.mark.parametrize("n, reach, leaf", [(1, 1, 4), (2, 1, 4), (60, 1, 4), (60, 60, 2), (90, 5, 16)])
def test_tree_field_integrators_equal_brute_force(seed, n, reach, leaf):
    edges, x = random_tree(n, seed, reach), torch.randn(2, n, 3)
    shuffle = torch.randperm(n)  # names of nodes must not matter
    for lengths, f in (
        (torch.rand(n - 1), z.PolynomialExponential([1.0, -0.5, 0.1])),
        (torch.rand(n - 1), z.PolynomialExponential([1.0, 0.2], -0.7)),
        (1.0 + torch.arange(n - 1) % 3, z.OnIntegers(lambda d: 1 / (1 + d * d))),
        (torch.ones(n - 1), z.OnIntegers(z.ExponentialQuadratic(-0.4))),
    ):
        d = torch.zeros(n, n)
        d[shuffle[:, None], shuffle] = all_distances(edges, lengths)
        tree = z.IntegratorTree(shuffle[edges] if n > 1 else edges, lengths, leaf)
        fast, brute = z.integrate(tree, f, x), f(d) @ x
        assert (fast - brute).norm() < 1e-5 * brute.norm()


def test_tree_field_integrators_without_the_pivot_correction_fail(seed):
    edges, x, f = random_tree(80, seed), torch.randn(80, 2), z.PolynomialExponential([1.0, 0.2], -0.7)
    tree = z.IntegratorTree(edges, torch.rand(79), leaf=8)
    right = z.integrate(tree, f, x)
    tree.pivots = tree.pivots[:0]
    assert (z.integrate(tree, f, x) - right).norm() > 0.1 * right.norm()


def test_topological_attention(seed):
    edges = z.grid_tree(5, 6)
    tree, d = z.IntegratorTree(edges, torch.ones(29), leaf=4), all_distances(edges, torch.ones(29))
    q, k, v = torch.randn(3, 2, 2, 30, 4).unbind(0)
    f = z.ExponentialQuadratic()
    attend = z.TopologicalAttention(tree, z.OnIntegers(f), leaf=4)
    assert contracts.reduces_to(attend, z.Featured(z.elu_features), q, k, v)
    with torch.no_grad():
        f.abc.copy_(torch.tensor([0.01, -0.5, 0.2]))
    explicit = lambda q, k, v: by_map(z.elu_features(q), z.elu_features(k), v, f(d))
    assert contracts.reduces_to(attend, explicit, q, k, v)
    assert not contracts.agree(attend, z.Featured(z.elu_features), q, k, v, atol=1e-2)
    ours, theirs = (torch.autograd.grad(way(q, k, v).square().sum(), f.abc)[0] for way in (attend, explicit))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    real = torch.rand(2, 1, 1, 30) < 0.6
    hidden = lambda q, k, v: by_map(z.elu_features(q), z.elu_features(k) * real.mT, v, f(d))
    assert contracts.reduces_to(lambda q, k, v: attend(q, k, v, real), hidden, q, k, v)
    with pytest.raises(ValueError, match=r"\(30, 30\)"):
        attend(q, k, v, torch.ones(30, 30, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"30 nodes.* got 29"):
        attend(q[..., :29, :], k[..., :29, :], v[..., :29, :])
    with pytest.raises(ValueError, match="30 nodes, the field 29"):
        z.integrate(tree, f, v[..., :29, :])
    with pytest.raises(ValueError, match="need a tree"):
        z.IntegratorTree(torch.tensor([[0, 1], [0, 1], [2, 3]]), torch.ones(3))


@pytest.mark.parametrize(
    "n, reach, leaf, length", [(1, 1, 4, 1), (2, 1, 2, 1), (90, 90, 2, 1), (120, 4, 8, 3), (60, 2, 4, 40)]
)
def test_topological_attention_in_pieces_equals_field_and_map(seed, n, reach, leaf, length):
    shuffle, f = torch.randperm(n), z.OnIntegers(lambda d: 1 / (1 + d * d / length**2))
    edges = random_tree(n, seed, reach)
    lengths = length * (1.0 + torch.arange(n - 1) % 2)
    d = torch.zeros(n, n)
    d[shuffle[:, None], shuffle] = all_distances(edges, lengths)
    tree = z.IntegratorTree(shuffle[edges] if n > 1 else edges, lengths, leaf)
    q, k, v = torch.randn(3, 2, n, 3).unbind(0)
    slow = lambda q, k, v: (q @ k.mT * f(d)) @ v
    sums = z.TreeSums(tree, leaf, piece=4)
    assert bool(sums.far) == (n > leaf)
    scale = slow(q, k, v).abs().max().item() + 1
    assert contracts.reduces_to(lambda *qkv: sums(f, *qkv), slow, q, k, v, atol=2e-5 * scale)
    assert contracts.reduces_to(lambda *qkv: z.field_sums(tree, f, *qkv), slow, q, k, v, atol=2e-5 * scale)
    assert contracts.agree(lambda *qkv: z.TreeSums(tree)(f, *qkv), slow, q, k, v, atol=2e-5 * scale)
    if sums.far:  # pieces read their own bins, not the ones opposite
        sums.far.from_bins = sums.far.to_bins.turned()
        assert not contracts.agree(lambda *qkv: sums(f, *qkv), slow, q, k, v, atol=1e-2)


def test_topological_attention_takes_other_functions_and_batches(seed):
    edges, lengths = random_tree(40, seed), torch.rand(39)
    tree, f = z.IntegratorTree(edges, lengths, leaf=4), z.PolynomialExponential([1.0, 0.2], -0.7)
    q, k, v = torch.randn(3, 2, 40, 4).unbind(0)
    explicit = lambda q, k, v: by_map(z.elu_features(q), z.elu_features(k), v, f(all_distances(edges, lengths)))
    assert contracts.reduces_to(z.TopologicalAttention(tree, f), explicit, q, k, v)
    whole = z.TopologicalAttention(
        z.IntegratorTree(edges, torch.ones(39)), z.OnIntegers(z.ExponentialQuadratic(-0.3)), leaf=4
    )
    both = whole(q, k, v)
    assert torch.allclose(both[:1], whole(q[:1], k[:1], v[:1]), atol=1e-6)
    assert torch.allclose(both[0], whole(q[0], k[0], v[0]), atol=1e-6)


@pytest.mark.parametrize("bins", [1, 7, 512, 513, 700])
def test_tree_field_integrators_matrix_and_fourier_agree(seed, bins):
    f, sums = z.OnIntegers(lambda d: (-d / bins).exp()), torch.randn(2, bins, 3)
    a = torch.arange(bins)
    exact = f((a[:, None] + a).double()) @ sums.double()
    assert torch.allclose(f.between(sums).double(), exact, atol=1e-5 * bins**0.5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ EcoFormer


@sizes
def test_ecoformer_linear_form_equals_the_map(seed, b, h, n, e):
    q, k, v = torch.randn(b, h, n, e).sign(), torch.randn(b, h, n + 2, e).sign(), torch.randn(b, h, n + 2, 3)
    hamming = (q.unsqueeze(-2) != k.unsqueeze(-3)).sum(-1)
    weights = q @ k.mT + e + 1
    assert torch.equal(weights, 2.0 * (e - hamming) + 1)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    assert torch.allclose(z.code_attention(q, k, v), expected, atol=1e-5)
    ones = torch.ones_like(v)
    assert torch.allclose(z.code_attention(q, k, ones), ones[..., :n, :], atol=1e-5)
    m = n + 2
    released = (q @ (k.mT @ v[..., :m, :]) + (e + 1) * v[..., :n, :]) / weights.sum(-1, keepdim=True)
    assert not torch.allclose(released, expected, atol=1e-2)


def test_ecoformer_hash_learns(seed):
    mix = torch.randn(8, 8) * torch.linspace(2, 0.1, 8)
    x, new = (torch.randn(2, 64, 8) @ mix + 1.5 for _ in range(2))
    hashing = z.KernelHash(2, 8, bits=8, seed=seed)

    def gap(codes):
        pairs, scores = z.similar_pairs(F.normalize(new, dim=-1), 8), codes @ codes.mT
        return (scores[pairs > 0].mean() - scores[pairs < 0].mean()).item()

    hashing.learn(x, count=8)
    assert set(hashing(new).unique().tolist()) == {-1.0, 1.0}
    planes = torch.randn(2, 8, 8)
    assert gap(hashing(new)) > gap(torch.where(new @ planes > 0, 1.0, -1.0)) + 0.3


def test_ecoformer_kernel_is_centered_and_as_wide_as_the_data(seed):
    x, hashing = torch.randn(2, 64, 8) + 1.5, z.KernelHash(2, 8, bits=4, seed=seed)
    hashing.learn(x, count=8, steps=2)
    assert torch.allclose(hashing.kernel(x).mean(1), torch.zeros(2, 25), atol=1e-5)
    unit = x / x.norm(dim=-1, keepdim=True)
    away = (unit[:, :, None] - hashing.anchors[:, None]).square().sum(-1)  # (h, n, m)
    raw = (-away / (2 * away.mean((1, 2), keepdim=True))).exp()
    assert torch.allclose(hashing.kernel(x), raw - raw.mean(1, keepdim=True), atol=1e-5)


def test_ecoformer_layer(seed):
    layer, x = z.EcoAttention(16, 2, bits=8, anchors=6), torch.randn(2, 12, 16)
    before = layer(x)
    layer.learn(x, count=3, steps=5)
    assert not torch.allclose(layer(x), before, atol=1e-3)
    assert contracts.gradients_reach(layer, x)
    real = torch.arange(12) < torch.tensor([[12], [8]])
    assert contracts.padding_invariant(lambda x, real: layer(x, padding_mask(real)), x, real)
    with pytest.raises(ValueError, match="3 heads"):
        z.EcoAttention(16, 3)


# ----------------------------------------------------------------------------------------------- almost linear gradient


@pytest.mark.parametrize("e, degree", [(1, 3), (3, 0), (4, 2), (2, 5)])
def test_almost_linear_gradient_features(seed, e, degree):
    q, k = torch.randn(2, 2, 6, e, dtype=torch.float64).unbind(0)
    u, w = z.taylor_features(q, degree), z.taylor_features(k, degree)
    assert u.shape[-1] == math.comb(e + degree, degree)
    s = q @ k.mT
    assert torch.allclose(u @ w.mT, sum(s**i / math.factorial(i) for i in range(degree + 1)))
    with pytest.raises(ValueError, match="got -1"):
        z.taylor_features(q, -1)


@pytest.mark.parametrize("sums, exact", [(z.EVERYWHERE, attention), (z.CAUSAL, causal_attention)], ids=["all", "past"])
def test_almost_linear_gradient_converges_to_softmax(seed, sums, exact):
    parts = torch.randn(3, 2, 2, 70, 3, dtype=torch.float64).mul(0.6).unbind(0)
    ours = lambda degree: partial(z.polynomial_attention, degree=degree, sums=sums)
    assert contracts.reduces_to(ours(12), exact, *parts, atol=1e-6)
    assert not contracts.agree(ours(2), exact, *parts, atol=1e-3)
    large = [4 * t for t in parts]
    assert not contracts.agree(ours(12), exact, *large, atol=1e-2)
    other = z.CAUSAL if sums is z.EVERYWHERE else z.EVERYWHERE
    assert not contracts.agree(partial(z.polynomial_attention, degree=12, sums=other), exact, *parts, atol=1e-2)


def test_almost_linear_gradient_with_the_wrong_sums_backward_fails(seed):
    parts = torch.randn(3, 1, 1, 20, 2, dtype=torch.float64).mul(0.5).unbind(0)
    wrong = (z.past_pairs, z.past_pairs)  # keys would get their gradients from the past
    assert contracts.agree(partial(z.polynomial_attention, degree=12, sums=wrong), causal_attention, *parts)
    assert not contracts.reduces_to(partial(z.polynomial_attention, degree=12, sums=wrong), causal_attention, *parts)
    with pytest.raises(ValueError, match="not a square map"):
        z.polynomial_attention(parts[0][..., :3, :], parts[1], parts[2], 2, z.CAUSAL)
    with pytest.raises(ValueError, match=r"\(20, 20\)"):
        z.PolynomialAttention(2)(*parts, torch.ones(20, 20, dtype=torch.bool))


@pytest.mark.parametrize("sums, exact", [(z.EVERYWHERE, attention), (z.CAUSAL, causal_attention)])
def test_almost_linear_gradient_gives_padding_no_weight(sums, exact):
    parts = torch.randn(3, 2, 2, 9, 2, dtype=torch.float64).mul(0.5).unbind(0)
    real = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    real[0, ..., :2], real[1, ..., 6:] = False, False
    found = partial(z.polynomial_attention, degree=12, sums=sums, mask=real)
    seen = lambda out: out[0, :, 2:] if sums is z.CAUSAL else out  # a query without keys: zeros in both, by another way
    assert contracts.reduces_to(lambda *x: seen(found(*x)), lambda *x: seen(exact(*x, mask=real)), *parts)


# ----------------------------------------------------------------------------------------------------------------- cost


# numbers that each causal layer keeps of b texts with n tokens: width 64, 4 heads (16 for Taylor)
KEPT = {
    "linear": lambda b, n: b * 4 * 16 * 17 + 1,
    "Performer": lambda b, n: b * 4 * (64 * 17 + 1) + 1,
    "cosFormer": lambda b, n: b * 4 * 32 * 17 + 1,
    "Taylor, 16 heads": lambda b, n: b * 16 * 15 * 5,
    "AFT-simple": lambda b, n: b * 2 * 64,
    "AFT-local": lambda b, n: b * (2 * 64 + 2 * 64 * min(n, 15)) + 1,
    "AFT-full": lambda b, n: b * 2 * 64 * n,
}


@pytest.mark.parametrize("name", list(KEPT))
def test_a_text_in_pieces_is_the_whole_text_and_the_state_has_the_promised_size(name):
    torch.manual_seed(0)
    layer, (x,) = z.mechanisms[name]()
    x = x[:2, :60]
    with torch.no_grad(), remember(layer) as past:
        pieces, kept = [], []
        for piece in x.split([1, 3, 26, 30], 1):
            pieces.append(layer(piece))
            kept.append(past.numbers())
        assert torch.allclose(torch.cat(pieces, 1), copy.deepcopy(layer)(x), atol=1e-5)  # the copy remembers nothing
    assert kept == [KEPT[name](2, n) for n in (1, 4, 30, 60)]


@pytest.mark.parametrize("name", ["Linformer", "Nyström", "EcoFormer", "tree mask"])
def test_what_sees_later_tokens_refuses_pieces(name):
    layer, (x,) = z.mechanisms[name]()
    with pytest.raises(ValueError, match="later tokens"), remember(layer):
        layer(x[:, :40])


@pytest.mark.parametrize("kind", ["elu", "performer", "cosformer"])
def test_padding_in_a_piece_changes_no_state(kind):
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 2, attend=z.Featured(FEATURES[kind](8), z.causal_feature_attention))
    x, real = torch.randn(2, 9, 16), torch.arange(9) != torch.tensor([[9], [2]])
    cut = lambda t: t.split([4, 1, 4], 1)
    with torch.no_grad(), remember(layer):
        pieces = [layer(piece, padding_mask(keep)) for piece, keep in zip(cut(x), cut(real), strict=True)]
    assert torch.allclose(torch.cat(pieces, 1), layer(x, padding_mask(real)), atol=1e-5)
    assert not torch.allclose(torch.cat(pieces, 1), layer(x), atol=1e-3)


@pytest.mark.parametrize("name", [n for n in z.mechanisms if n != "plain attention"])
@pytest.mark.parametrize("kind", [torch.bfloat16, "autocast"], ids=["bf16", "autocast"])
def test_sixteen_bits_stay_near(name, kind):
    torch.manual_seed(0)
    layer, (x,) = z.mechanisms[name]()
    wanted = layer(x.requires_grad_())
    (slope,) = torch.autograd.grad(wanted.square().mean(), x)
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    else:
        found = layer.to(kind)(x.to(kind))
    (other,) = torch.autograd.grad(found.float().square().mean(), x)
    if name == "EcoFormer":  # a sign is another one after rounding, now and then
        assert found.isfinite().all() and other.isfinite().all()
        return
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert (other - slope).norm() < 0.06 * slope.norm()


@pytest.mark.parametrize("name", [n for n in z.mechanisms if n != "plain attention"])
def test_gradients_by_transform_equal_those_of_autograd(name):
    torch.manual_seed(0)
    layer, (x,) = z.mechanisms[name]()
    weights, x = dict(layer.named_parameters()), x[:2, :128]
    loss = lambda weights, x: torch.func.functional_call(layer, weights, (x[None],)).square().mean()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(2):
        found = torch.autograd.grad(loss(weights, x[i]), list(weights.values()))
        for slope, (key, wanted) in zip(found, each.items(), strict=True):
            assert torch.allclose(slope, wanted[i], rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("name", list(z.mechanisms))
def test_mechanisms_keep_the_shape(name):
    layer, (x,) = z.mechanisms[name]()
    x = x[:1]
    assert layer(x).shape == x.shape
    causal = name in ("plain attention", "linear", "Performer", "cosFormer", "Taylor, 16 heads") or "AFT" in name
    with torch.no_grad():
        later = torch.cat([x[:, :100], torch.randn_like(x[:, 100:])], 1)
        same = torch.allclose(layer(x)[:, :100], layer(later)[:, :100], atol=1e-5)
    assert same == causal


@pytest.mark.parametrize(
    "attend",
    [
        z.Featured(z.elu_features, z.causal_feature_attention),
        z.Featured(partial(z.cosine_features, length=2048), z.causal_feature_attention),
        z.ProjectedAttention(2048, 16),
        z.NystromAttention(16),
        z.PolynomialAttention(2, z.CAUSAL),
    ],
    ids=["linear", "cosformer", "linformer", "nystrom", "polynomial"],
)
def test_memory_grows_with_the_length(attend):
    counts = [512, 1024, 2048]
    with torch.no_grad():
        peak = [measure.peak_bytes(attend, *torch.randn(3, 1, 2, n, 8).unbind(0)) for n in counts]
    assert measure.growth(counts, peak).exponent < 1.15

"""Chapter 01: attention, its masks, its heads, and the three papers, on random shapes and seeds."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.zoo.attention import (
    ColumnBlock,
    CrossAttention,
    LowRankClassifier,
    LowRankPooling,
    MultiHeadAttention,
    as_columns,
    attention,
    attention_weights,
    causal_attention,
    causal_mask,
    column_attention,
    fixed_head_attention,
    head_for_pattern,
    low_rank_pooling,
    merge_heads,
    padding_mask,
    split_heads,
    watch,
)

SEEDS = range(3)


def numbers(seed: int):
    """A function that draws whole numbers: pick(low, high), both included."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    return lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))


def qkv(seed: int, dtype=torch.float64):
    pick = numbers(seed)
    b, h, n, m, e, c = pick(1, 3), pick(1, 4), pick(1, 9), pick(1, 11), pick(1, 8), pick(1, 8)
    shapes = ((b, h, n, e), (b, h, m, e), (b, h, m, c))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def by_hand(q, k, v, mask=None, bias=None, scale=None):
    """Attention for one query at a time, straight from the formula."""
    b, h, n, e = q.shape
    m = k.shape[2]
    scale = e**-0.5 if scale is None else scale
    mask = torch.ones(b, h, n, m, dtype=torch.bool) if mask is None else mask.expand(b, h, n, m)
    bias = torch.zeros(b, h, n, m, dtype=q.dtype) if bias is None else bias.expand(b, h, n, m)
    out = torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype)
    for i in range(b):
        for head in range(h):
            for row in range(n):
                seen = [j for j in range(m) if mask[i, head, row, j]]
                exps = [
                    math.exp(float(q[i, head, row] @ k[i, head, j]) * scale + float(bias[i, head, row, j]))
                    for j in seen
                ]
                for weight, j in zip(exps, seen, strict=True):
                    out[i, head, row] += weight / sum(exps) * v[i, head, j]
    return out


# ------------------------------------------------------------------------------------------------------ the function


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_attention_equals_the_formula(seed, masked, biased):
    q, k, v = qkv(seed)
    n, m = q.shape[2], k.shape[2]
    mask = torch.rand(q.shape[0], 1, n, m) > 0.4 if masked else None
    if masked:
        mask[0, 0, 0] = False  # a query that may look at nothing
    bias = torch.randn(q.shape[1], n, m, dtype=q.dtype) if biased else None
    expected = by_hand(q, k, v, mask, bias, scale=0.7)
    torch.testing.assert_close(attention(q, k, v, mask, bias, scale=0.7), expected)
    torch.testing.assert_close(attention_weights(q, k, mask, bias, scale=0.7) @ v, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_scale_defaults_to_one_over_the_root_of_the_head_width(seed):
    q, k, v = qkv(seed)
    torch.testing.assert_close(attention(q, k, v), by_hand(q, k, v))
    torch.testing.assert_close(attention_weights(q, k).sum(-1), torch.ones(q.shape[:-1], dtype=q.dtype))
    if q.shape[-1] > 1 and k.shape[2] > 1:
        assert not torch.allclose(attention(q, k, v), by_hand(q, k, v, scale=1.0)), "a missing scale goes unnoticed"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_fused_and_written_out_agree(seed, masked):
    q, k, v = qkv(seed)
    mask = torch.rand(q.shape[2], k.shape[2]) > 0.3 if masked else None
    if masked:
        mask[:, 0] = True
    written = lambda q, k, v: attention_weights(q, k, mask) @ v
    assert contracts.reduces_to(lambda q, k, v: attention(q, k, v, mask), written, q, k, v, atol=1e-10)


def test_a_row_without_allowed_keys_gives_zeros_and_no_nan_in_the_gradient():
    q, k, v = (torch.randn(1, 2, 4, 3, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4, [False] * 4])
    out = attention(q, k, v, mask)
    assert (out[:, :, [1, 3]] == 0).all()
    out.square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


@pytest.mark.parametrize(
    "call",
    [
        attention,
        lambda q, k, v, mask: attention_weights(q, k, mask),
        causal_attention,
    ],
    ids=["fused", "written out", "causal"],
)
def test_masks_of_the_wrong_shape_are_refused(call):
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    with pytest.raises(ValueError, match="5, 5"):
        call(q, k, v, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="2, 3"):
        call(q, k, v, torch.ones(2, 3, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("seed", SEEDS)
def test_causal_mask_lets_queries_be_the_last_positions(seed):
    pick = numbers(seed)
    n = pick(1, 6)
    m = n + pick(0, 5)
    mask = causal_mask(n, m)
    for i in range(n):
        for j in range(m):
            assert mask[i, j] == (j <= i + m - n)
    assert torch.equal(causal_mask(m)[m - n :], mask)
    with pytest.raises(ValueError, match=f"{m + 1} queries and {m} keys"):
        causal_mask(m + 1, m)


@pytest.mark.parametrize("seed", SEEDS)
def test_causal_attention_of_the_last_queries_is_that_of_all(seed):
    pick = numbers(seed)
    b, h, n, e = pick(1, 3), pick(1, 3), pick(2, 9), pick(1, 6)
    q, k, v = torch.randn(3, b, h, n, e, dtype=torch.float64).unbind(0)
    whole = causal_attention(q, k, v)
    torch.testing.assert_close(whole, by_hand(q, k, v, causal_mask(n)))
    for last in range(1, n + 1):
        torch.testing.assert_close(causal_attention(q[:, :, -last:], k, v), whole[:, :, -last:])
    bias, mask = torch.randn(n, n, dtype=torch.float64), torch.rand(n, n) > 0.3
    expected = by_hand(q, k, v, causal_mask(n) & mask, bias)
    torch.testing.assert_close(causal_attention(q, k, v, mask, bias), expected)


CAUSAL = {
    "plain": causal_attention,
    "with a mask": lambda q, k, v, mask=None: causal_attention(q, k, v, torch.ones(q.shape[-2:-1] * 2).bool()),
    "with a bias": lambda q, k, v, mask=None: causal_attention(q, k, v, bias=torch.zeros(q.shape[-2:-1] * 2)),
    "masked by hand": lambda q, k, v, mask=None: attention(q, k, v, causal_mask(q.shape[-2])),
}
LEAKING = {
    "no mask": attention,
    "upside down": lambda q, k, v, mask=None: attention(q, k, v, ~causal_mask(q.shape[-2])),
    "transposed": lambda q, k, v, mask=None: attention(q, k, v, causal_mask(q.shape[-2]).T),
    "one too many": lambda q, k, v, mask=None: attention(q, k, v, torch.ones(q.shape[-2:-1] * 2).bool().tril(1)),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_variants_do_not_see_the_future(name, seed):
    pick = numbers(seed)
    heads, x = pick(1, 3), torch.randn(2, pick(2, 8), 12)
    assert contracts.causal(MultiHeadAttention(12, heads, attend=CAUSAL[name]), x)


@pytest.mark.parametrize("name", LEAKING)
def test_a_leak_is_found(name):
    assert not contracts.causal(MultiHeadAttention(12, 3, attend=LEAKING[name]), torch.randn(2, 6, 12))


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_is_not_seen(seed):
    pick = numbers(seed)
    layer = MultiHeadAttention(8, 2)
    n = pick(3, 9)
    x, real = torch.randn(2, n, 8), torch.ones(2, n, dtype=torch.bool)
    real[1, pick(1, n - 1) :] = False
    masked = lambda x, real: layer(x, mask=padding_mask(real))
    inverted = lambda x, real: layer(x, mask=padding_mask(~real))
    assert contracts.padding_invariant(masked, x, real)
    assert not contracts.padding_invariant(lambda x, real: layer(x), x, real)
    assert not contracts.padding_invariant(inverted, x, real)


# ------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("seed", SEEDS)
def test_heads_are_slices_of_the_width(seed):
    pick = numbers(seed)
    b, n, h, e = pick(1, 3), pick(1, 6), pick(1, 4), pick(1, 5)
    x = torch.randn(b, n, h * e)
    heads = split_heads(x, h)
    for i in range(h):
        assert torch.equal(heads[:, i], x[..., i * e : (i + 1) * e])
    assert torch.equal(merge_heads(heads), x)
    if n > 1 and h > 1:
        assert not torch.equal(x.reshape(b, h, n, e), heads), "a reshape without the transpose goes unnoticed"


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10.*3"):
        split_heads(torch.randn(1, 2, 10), 3)
    for layer in (MultiHeadAttention, CrossAttention):
        with pytest.raises(ValueError, match="10.*3"):
            layer(10, 3)
        layer(10, 3, head_width=4)


def torch_layer(width, heads, bias, context=None):
    theirs = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True, kdim=context, vdim=context)
    for parameter in theirs.parameters():  # also the biases, which torch starts at zero
        nn.init.normal_(parameter, std=0.3)
    return theirs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [None, "causal", "padding"])
def test_multi_head_attention_equals_torch(seed, bias, masked):
    pick = numbers(seed)
    heads, n = pick(1, 4), pick(2, 7)
    width = heads * pick(1, 5)
    theirs, ours = torch_layer(width, heads, bias), MultiHeadAttention(width, heads, bias=bias)
    names = {"in_proj_weight": "to_qkv.weight", "in_proj_bias": "to_qkv.bias"}
    contracts.copy_weights(theirs, ours, lambda name: names.get(name, name.replace("out_proj", "to_out")))
    x, real = torch.randn(2, n, width), torch.ones(2, n, dtype=torch.bool)
    real[1, n - 1 :] = False
    blocked = {"attn_mask": ~causal_mask(n)} if masked == "causal" else {}
    blocked |= {"key_padding_mask": ~real} if masked == "padding" else {}
    mask = {None: None, "causal": causal_mask(n)[None, None], "padding": padding_mask(real)}[masked]
    reference = lambda x: theirs(x, x, x, need_weights=False, **blocked)[0]
    assert contracts.reduces_to(lambda x: ours(x, mask=mask), reference, x)
    if masked is None:
        _, maps = theirs(x, x, x, average_attn_weights=False)
        torch.testing.assert_close(ours.maps(x), maps)


@pytest.mark.parametrize("seed", SEEDS)
def test_cross_attention_equals_torch(seed):
    pick = numbers(seed)
    heads, n, m, context = pick(1, 3), pick(1, 6), pick(1, 6), pick(1, 9)
    width = heads * pick(2, 5)
    context += context == width  # with equal widths torch stores the weights in another way
    theirs, ours = torch_layer(width, heads, True, context), CrossAttention(width, heads, context)
    w_k, w_v = theirs.k_proj_weight, theirs.v_proj_weight
    b_q, b_kv = theirs.in_proj_bias.split([width, 2 * width])
    state = {"to_q.weight": theirs.q_proj_weight, "to_q.bias": b_q}
    state |= {"to_kv.weight": torch.cat([w_k, w_v]), "to_kv.bias": b_kv}
    state |= {f"to_out.{name}": value for name, value in theirs.out_proj.state_dict().items()}
    ours.load_state_dict(state)
    x, y = torch.randn(2, n, width), torch.randn(2, m, context)
    assert contracts.reduces_to(ours, lambda x, y: theirs(x, y, y, need_weights=False)[0], x, y)
    real = torch.rand(2, m) > 0.4
    real[:, 0] = True
    blocked = lambda x, y: theirs(x, y, y, need_weights=False, key_padding_mask=~real)[0]
    assert contracts.agree(lambda x, y: ours(x, y, mask=padding_mask(real)), blocked, x, y)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_knows_no_order_and_maps_are_its_weights(seed):
    pick = numbers(seed)
    layer = MultiHeadAttention(12, pick(1, 3) * 2, attend=attention)
    x = torch.randn(2, pick(2, 8), 12)
    q, k, _ = layer.project(x)
    torch.testing.assert_close(layer.maps(x), attention_weights(q, k))
    assert contracts.permutation_equivariant(layer, x)
    assert not contracts.permutation_equivariant(MultiHeadAttention(12, 2, attend=causal_attention), x)


# ------------------------------------------------------------------------------------------------------------ papers


@pytest.mark.parametrize("seed", SEEDS)
def test_introduction_columns_are_rows_transposed(seed):
    pick = numbers(seed)
    heads, n = pick(1, 4), pick(2, 8)
    rows = MultiHeadAttention(heads * pick(1, 5), heads, bias=False).double()
    x = torch.randn(n, rows.to_out.out_features, dtype=torch.float64)
    matrices = as_columns(rows)
    in_columns = lambda x: column_attention(x.T, *matrices).T
    assert contracts.reduces_to(in_columns, lambda x: rows(x[None])[0], x, atol=1e-10)
    u_q, u_k, v = matrices
    swapped = lambda x: column_attention(x.T, u_k, u_q, v).T
    assert not contracts.agree(swapped, lambda x: rows(x[None])[0], x, atol=1e-6), "queries and keys swapped"


def test_introduction_value_matrices_have_at_most_the_rank_of_a_head():
    *_, v = as_columns(MultiHeadAttention(12, 4, bias=False))
    assert v.shape == (4, 12, 12)
    assert (torch.linalg.matrix_rank(v, rtol=1e-5) == 3).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_introduction_block_commutes_with_permutations_and_has_its_number_of_parameters(seed):
    pick = numbers(seed)
    heads, hidden = pick(1, 3), pick(2, 9)
    d = heads * pick(1, 4)
    block, n = ColumnBlock(d, heads, hidden), pick(2, 7)
    x, order = torch.randn(d, n), torch.randperm(n)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])
    stage_1 = 2 * d * d + heads * d * d
    stage_2 = d * hidden + hidden + hidden * d + d
    assert measure.parameters(block) == stage_1 + stage_2 + 4 * d
    places = torch.randn(d, n)
    if d > 1 and not torch.equal(order, torch.arange(n)):
        assert not torch.allclose(block((x + places)[:, order]), block(x[:, order] + places), atol=1e-4)


def test_introduction_refuses_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="10.*3"):
        ColumnBlock(10, 3, 8)


@pytest.mark.parametrize("seed", SEEDS)
def test_head_bottleneck_rank_of_the_scores_is_the_head_width(seed):
    pick = numbers(seed)
    n, e = pick(3, 12), pick(1, 14)
    heads = pick(1, 3)
    layer = MultiHeadAttention(16, heads, head_width=e).double()
    q, k, _ = layer.project(torch.randn(1, n, 16, dtype=torch.float64))
    ranks = torch.linalg.matrix_rank(q @ k.transpose(-2, -1), rtol=1e-10)
    assert (ranks == min(n, e)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_head_bottleneck_a_wide_head_reaches_every_pattern_and_a_narrow_one_does_not(seed):
    pick = numbers(seed)
    n = pick(4, 10)
    d = n + pick(0, 6)
    x = torch.randn(n, d, dtype=torch.float64)
    pattern = (3 * torch.randn(n, n, dtype=torch.float64)).softmax(-1)

    def found(e):
        w_q, w_k = head_for_pattern(x, pattern, e)
        assert w_q.shape == w_k.shape == (d, e)
        return attention_weights(x @ w_q, x @ w_k, scale=1.0)

    for e in {n - 1, n, d}:
        torch.testing.assert_close(found(e), pattern, atol=1e-7, rtol=0)
    errors = [(found(e) - pattern).abs().max().item() for e in range(1, n - 1)]
    assert min(errors) > 1e-4


def test_head_bottleneck_bad_arguments():
    x, uniform = torch.randn(4, 6), torch.full((4, 4), 0.25)
    with pytest.raises(ValueError, match="n = 6, d = 4"):
        head_for_pattern(torch.randn(6, 4), torch.full((6, 6), 1 / 6), 2)
    for width in (0, 7):
        with pytest.raises(ValueError, match=f"head_width = {width}"):
            head_for_pattern(x, uniform, width)
    with pytest.raises(ValueError, match="smallest entry"):
        head_for_pattern(x, torch.eye(4), 2)


def test_head_bottleneck_the_remedy_keeps_the_head_width_whatever_the_heads():
    for heads in (1, 2, 5):
        layer = fixed_head_attention(10, heads, length=7)
        assert layer.head_width == 7 and layer.to_qkv.out_features == 3 * heads * 7
        assert layer(torch.randn(2, 7, 10)).shape == (2, 7, 10)
    assert contracts.causal(fixed_head_attention(10, 2, 6, attend=causal_attention), torch.randn(1, 6, 10))


@pytest.mark.parametrize("seed", SEEDS)
def test_low_rank_heads_equal_one_bilinear_form_per_head(seed):
    pick = numbers(seed)
    b, n, d, h = pick(1, 3), pick(1, 9), pick(2, 12), pick(1, 6)
    pool, tokens = LowRankPooling(d, h).double(), torch.randn(b, n, d, dtype=torch.float64)
    outer = torch.einsum("ch,dh->hcd", pool.p, pool.q)

    def full(tokens, axis=1):
        scores = torch.stack([(pool.context @ w @ tokens.transpose(1, 2)).tanh() for w in outer], -1)
        return F.normalize(scores, dim=-1).softmax(axis).transpose(1, 2) @ tokens

    assert contracts.reduces_to(pool, full, tokens, atol=1e-10)
    assert measure.parameters(pool) == 2 * h * d + d
    if n > 1:
        assert not contracts.agree(pool, lambda t: full(t, axis=2), tokens), "softmax over heads goes unnoticed"
        assert contracts.permutation_invariant(pool, tokens)
    _, weights = low_rank_pooling(tokens, pool.context, pool.p, pool.q)
    torch.testing.assert_close(weights.sum(-1), torch.ones(b, h, dtype=tokens.dtype))
    assert (weights.amax(-1) <= math.e**2 * weights.amin(-1) + 1e-9).all()


def test_low_rank_heads_work_grows_linearly():
    sizes = [32, 64, 128, 256]
    work = [measure.flops(LowRankPooling(16, 3), torch.randn(1, n, 16)) for n in sizes]
    assert measure.growth(sizes, work).exponent == pytest.approx(1, abs=0.02)


def test_low_rank_heads_classifier_needs_an_even_width():
    with pytest.raises(ValueError, match="15"):
        LowRankClassifier(20, 15, 2, classes=3)
    model = LowRankClassifier(20, 16, 3, classes=4)
    assert model(torch.randint(20, (2, 7))).shape == (2, 4)
    assert contracts.gradients_reach(model, torch.randint(20, (2, 7)))


@pytest.mark.parametrize("shape", [(3, 6, 6), (3, 6), (3, 1, 6), (6,), (3, 2, 6, 6), (2, 3, 6, 6), (3, 3, 1, 5)])
def test_a_mask_that_could_mean_two_things_is_refused(shape):
    """With three texts and three heads every axis of size 3 is a text, or a head."""
    q = torch.randn(3, 3, 6, 4)
    for attend in (attention, attention_weights, causal_attention) * (shape not in ((3, 6, 6), (3, 1, 6))):
        with pytest.raises(ValueError, match=r"the scores are \(3, 3, 6, 6\).*got"):
            attend(q, q, *([q] if attend is not attention_weights else []), mask=torch.ones(shape, dtype=torch.bool))
    for layer in (MultiHeadAttention(12, 3), CrossAttention(12, 3)):
        x = torch.randn(3, 6, 12)
        inputs = (x,) if isinstance(layer, MultiHeadAttention) else (x, x)
        with pytest.raises(ValueError):
            layer(*inputs, mask=torch.ones(shape, dtype=torch.bool))
        layer(*inputs, mask=torch.ones(3, 1, 1, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    "heads, head_width, number", [(0, None, "0"), (-4, None, "-4"), (0, 8, "0"), (2, 0, "0"), (5, None, "5")]
)
def test_heads_that_cannot_be_are_refused(heads, head_width, number):
    for layer in (MultiHeadAttention, CrossAttention):
        with pytest.raises(ValueError, match=number):
            layer(64, heads, head_width=head_width)


def test_a_bias_goes_through_the_layer():
    layer, x, bias = MultiHeadAttention(16, 2), torch.randn(2, 5, 16), torch.randn(2, 2, 5, 5)
    q, k, v = layer.project(x)
    expected = layer.to_out(((attention_weights(q, k, bias=bias)) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, bias=bias), expected)
    mask = torch.rand(2, 1, 1, 5) > 0.3
    expected = layer.to_out(((attention_weights(q, k, mask, bias)) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask, bias), expected)


# --------------------------------------------------------------------------------------- shared heads, and watching


@pytest.mark.parametrize("seed", SEEDS)
def test_heads_that_share_keys_are_those_of_copied_keys(seed):
    pick = numbers(seed)
    b, g, times, n, e = pick(1, 3), pick(1, 3), pick(2, 3), pick(2, 8), pick(1, 6)
    q = torch.randn(b, g * times, n, e, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, b, g, n + 2, e, dtype=torch.float64, requires_grad=True).unbind(0)
    copies = lambda t: t.repeat_interleave(times, 1)
    mask, bias = torch.rand(b, 1, n, n + 2) > 0.3, torch.randn(g * times, n, n + 2, dtype=torch.float64)
    for attend in (attention, causal_attention):
        for given in ({}, {"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias, "scale": 0.3}):
            shared = partial(attend, **given)
            assert contracts.reduces_to(
                shared, lambda q, k, v, shared=shared: shared(q, copies(k), copies(v)), q, k, v, atol=1e-10
            )
    square = causal_attention(q, k[:, :, :n], v[:, :, :n])
    torch.testing.assert_close(square, by_hand(q, copies(k[:, :, :n]), copies(v[:, :, :n]), causal_mask(n)))
    with pytest.raises(ValueError, match=f"{g * times} query heads cannot share {g * times + 1} evenly"):
        attention(q, torch.randn(b, g * times + 1, n, e), torch.randn(b, g * times + 1, n, e))


def test_causal_attention_with_shared_heads_makes_no_table():
    n, e = 1024, 16
    q, (k, v) = torch.randn(1, 4, n, e), torch.randn(2, 1, 2, n, e).unbind(0)
    assert measure.peak_bytes(causal_attention, q, k, v) < n * n


def test_a_watched_layer_shows_what_it_reads_and_does_the_same():
    model = nn.Sequential(MultiHeadAttention(12, 3), nn.ReLU(), MultiHeadAttention(12, 3, attend=causal_attention))
    x, mask = torch.randn(2, 5, 12), torch.rand(2, 1, 1, 5) > 0.2
    plain = model(x)
    with watch(model) as seen:
        assert torch.equal(model(x), plain)
    assert list(seen) == ["0", "2"] and torch.equal(model(x), plain) and model[0].watched is None
    between = model[1](model[0](x))
    for name, layer, tokens in (("0", model[0], x), ("2", model[2], between)):
        for shown, own in zip((seen[name].q, seen[name].k, seen[name].v), layer.project(tokens), strict=True):
            assert torch.equal(shown, own)
        torch.testing.assert_close(seen[name].pattern, layer.maps(tokens))
    with watch(model[0]) as seen:
        model[0](x, mask, bias=torch.ones(5, 5).tril())
    torch.testing.assert_close(
        seen[""].pattern, attention_weights(seen[""].q, seen[""].k, mask, torch.ones(5, 5).tril())
    )
    torch.testing.assert_close(seen[""].pattern, model[0].maps(x, mask, bias=torch.ones(5, 5).tril()))


@pytest.mark.parametrize("what", ["q", "k", "v", "pattern"])
def test_what_is_changed_in_a_watched_layer_is_what_it_uses(what):
    layer, x, other = MultiHeadAttention(12, 3), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    parts = dict(zip("qkv", layer.project(x), strict=True))
    new = layer.maps(other) if what == "pattern" else dict(zip("qkv", layer.project(other), strict=True))[what]
    with watch(layer, lambda name, seen: setattr(seen, what, new)) as shown:
        changed = layer(x)
    assert torch.equal(getattr(shown[""], what), new)
    weights = new if what == "pattern" else attention_weights(*({**parts, what: new}[name] for name in "qk"))
    found = weights @ (new if what == "v" else parts["v"])
    torch.testing.assert_close(changed, layer.to_out(merge_heads(found)))


def test_watching_nests_ends_after_an_error_and_sees_cross_attention():
    layer, x, context = CrossAttention(12, 3), torch.randn(2, 4, 12), torch.randn(2, 6, 12)
    calls = []
    with watch(layer, lambda name, seen: calls.append("outer")):
        with watch(layer, lambda name, seen: calls.append("inner")) as seen:
            layer(x, context)
        layer(x, context)
    assert calls == ["inner", "outer"] and layer.watched is None
    torch.testing.assert_close(seen[""].pattern, layer.maps(x, context))
    with pytest.raises(RuntimeError), watch(layer):
        layer(x, torch.randn(2, 6, 5))
    assert layer.watched is None
    with pytest.raises(ValueError, match="Linear has no attention layer"), watch(nn.Linear(2, 2)):
        pass


def test_a_pattern_is_shared_by_heads_that_share_their_values():
    def double(name, seen):
        seen.k, seen.v = seen.k[:, ::2], seen.v[:, ::2]

    layer, x = MultiHeadAttention(16, 4), torch.randn(2, 5, 16)
    with watch(layer, double):
        expected = layer(x)

    def own(name, seen):
        double(name, seen)
        seen.pattern = seen.pattern

    with watch(layer, own):
        torch.testing.assert_close(layer(x), expected)

"""Chapter 03: every scheme against its formula on random shapes, and against the published models."""

from functools import partial

import pytest
import torch
from torch import nn

from tfkit import contracts, measure
from tfkit.zoo import positions as p
from tfkit.zoo.attention import MultiHeadAttention, attention, attention_weights, causal_attention, causal_mask
from tfkit.zoo.transformer import remember

SIZES = [(2, 3, 7, 8), (1, 2, 12, 4), (3, 1, 5, 6)]  # batch, heads, tokens, head width
sizes = pytest.mark.parametrize("b, h, n, e", SIZES)
seeds = pytest.mark.parametrize("seed", [0, 1])


def qkv(b, h, n, e, seed=0, m=None):
    torch.manual_seed(seed)
    m = n if m is None else m
    return torch.randn(b, h, n, e), torch.randn(b, h, m, e), torch.randn(b, h, m, e)


def randomized(module, scale=1.0):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def causal_schemes(h, e, length=40):
    """Every causal attend function of the chapter, with parameters that are not at their start."""
    c = causal_attention
    made = {
        "t5": p.T5Bias(h, c, p.t5_causal_buckets, buckets=8, furthest=16),
        "alibi": p.Alibi(h),
        "halves": p.Rotary(e, c),
        "pairs": p.Rotary(e, c, rotate=p.rotate_pairs),
        "shaw": p.ShawRelative(e, 3, p.causal_weights),
        "shaw_keys": p.ShawKeys(e, 3, c),
        "method_1": p.FactorByDistance(3, c),
        "method_2": p.FactorByOffset(3, c),
        "method_3": p.FactorByFeature(e, 3, c),
        "method_4": p.BetterRelative(e, 3, c),
        "urpe": p.UniversalRelative(h, length, p.causal_weights),
        "urpe_rotary": p.Rotary(e, p.UniversalRelative(h, length, p.causal_weights)),
        "complex": p.ComplexRotary(h, e, c),
    }
    return {name: randomized(scheme, 0.5) for name, scheme in made.items()}


NAMES = list(causal_schemes(2, 4))


# --- the slot


@pytest.mark.parametrize("name", NAMES)
@seeds
def test_every_scheme_is_causal(name, seed):
    torch.manual_seed(seed)
    layer = MultiHeadAttention(16, 4, attend=causal_schemes(4, 4)[name])
    assert contracts.causal(layer, torch.randn(2, 7, 16))


def test_causality_contract_finds_a_scheme_without_the_mask():
    layer = MultiHeadAttention(16, 4, attend=p.Alibi(4, attention))
    assert not contracts.causal(layer, torch.randn(2, 7, 16))
    layer = MultiHeadAttention(16, 4, attend=p.ShawRelative(4, 3))
    assert not contracts.causal(layer, torch.randn(2, 7, 16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [(1,) * 9, (4, 1, 4), (8, 1)])
def test_the_cache_changes_nothing(name, pieces):
    torch.manual_seed(0)
    model = p.positioned_model(11, 16, 2, 4, lambda: causal_schemes(4, 4)[name])
    ids = torch.randint(11, (2, 9))
    with torch.no_grad():
        whole, found, at = model(ids), [], 0
        with remember(model):
            for size in pieces:
                found.append(model(ids[:, at : at + size], start=at))
                at += size
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-4)


def test_a_wrapper_that_counts_queries_from_zero_is_found():
    class Wrong(p.Rotary):
        def forward(self, q, k, v, **given):
            angle = self.angles(k.shape[-2])
            return self.attend(self.rotate(q, angle[: q.shape[-2]]), self.rotate(k, angle), v, **given)

    model = p.positioned_model(11, 16, 1, 4, lambda: Wrong(4, causal_attention))
    ids = torch.randint(11, (1, 6))
    with torch.no_grad(), remember(model):
        cached = torch.cat([model(ids[:, t : t + 1], start=t) for t in range(6)], 1)
    assert not torch.allclose(cached, model(ids), atol=1e-3)


def placed(attend, content, start, total):
    n = content[0].shape[-2]
    q, k, v = (nn.functional.pad(t, (0, 0, start, total - start - n)) for t in content)
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[start : start + n, start : start + n] = True
    return attend(q, k, v, mask=mask)[..., start : start + n, :]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [1, 11])
def test_every_scheme_is_relative(name, start):
    torch.manual_seed(start)
    scheme = causal_schemes(2, 4)[name]
    content = qkv(2, 2, 6, 4)
    here, there = (placed(scheme, content, s, 24) for s in (0, start))
    assert torch.allclose(here, there, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "urpe_rotary"])
def test_a_given_bias_is_added(name):
    torch.manual_seed(3)
    scheme = causal_schemes(2, 4)[name]
    q, k, v = qkv(1, 2, 6, 4)
    blocking = torch.zeros(6, 6)
    blocking[:, 2] = -1e9  # as a mask would
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, 2] = False
    rows = [0, 1, 3, 4, 5]
    found, masked = (scheme(q, k, v, **given)[..., rows, :] for given in ({"bias": blocking}, {"mask": mask}))
    assert torch.allclose(found, masked, atol=1e-5)


@pytest.mark.parametrize("n, m", [(1, 1), (3, 3), (2, 7), (5, 6)])
def test_relative_positions_and_spread(n, m):
    table = torch.tensor([[j - (i + m - n) for j in range(m)] for i in range(n)])
    assert torch.equal(p.relative_positions(n, m), table)
    assert torch.equal(p.spread(torch.arange(1 - m, n).float(), n), table.float())
    values = torch.randn(3, n + m - 1)
    spread = p.spread(values, n)
    assert all(spread[h, i, j] == values[h, j - i + n - 1] for h in range(3) for i in range(n) for j in range(m))


def test_more_queries_than_keys_are_refused():
    q, k, v = qkv(1, 2, 5, 4, m=3)
    for scheme in (p.Alibi(2), p.T5Bias(2), p.Rotary(4)):
        with pytest.raises(ValueError, match="5 queries.*3 keys"):
            scheme(q, k, v)
    with pytest.raises(ValueError, match="5 queries, 3 keys"):
        p.relative_positions(5, 3)
    with pytest.raises(ValueError, match="3 offsets"):
        p.spread(torch.zeros(3), 5)


# --- ALiBi, T5, rotary against their formulas and against transformers


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_slopes_are_those_of_bloom(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    assert torch.allclose(p.alibi_slopes(heads), bloom._get_alibi_slopes(heads, torch.device("cpu")), rtol=1e-6)


def test_alibi_falls_with_distance():
    bias = p.Alibi(4).bias(6, 9)
    distance = p.relative_positions(6, 9).abs()
    assert torch.allclose(bias, -p.alibi_slopes(4)[:, None, None] * distance)
    with pytest.raises(ValueError, match="got 0"):
        p.alibi_slopes(0)


@pytest.mark.parametrize("heads", [2, 3])
def test_alibi_layer_is_bloom(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    width, n = 8 * heads, 9
    config = bloom.BloomConfig(hidden_size=width, n_head=heads, attention_dropout=0.0, hidden_dropout=0.0)
    theirs = bloom.BloomAttention(config, layer_idx=0).eval()
    ours = MultiHeadAttention(width, heads, attend=p.Alibi(heads))
    with torch.no_grad():
        for kind in ("weight", "bias"):
            fused = getattr(theirs.query_key_value, kind).unflatten(0, (heads, 3, 8)).transpose(0, 1).flatten(0, 2)
            getattr(ours.to_qkv, kind).copy_(fused)
            getattr(ours.to_out, kind).copy_(getattr(theirs.dense, kind))
        x = torch.randn(2, n, width)
        alibi = bloom.build_alibi_tensor(torch.ones(2, n), heads, torch.float32)
        mask = torch.zeros(2, 1, n, n).masked_fill(~causal_mask(n), torch.finfo(torch.float32).min)
        found = theirs(x, torch.zeros_like(x), alibi, mask)[0]
    assert torch.allclose(ours(x), found, atol=1e-5)
    ours.attend.slopes.neg_()
    assert not torch.allclose(ours(x), found, atol=1e-3)


@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 20), (16, 64), (12, 300)])
def test_t5_buckets_are_those_of_transformers(buckets, furthest):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    offset = torch.arange(-700, 701)
    for ours, both in ((p.t5_buckets, True), (p.t5_causal_buckets, False)):
        theirs = t5._relative_position_bucket(offset, both, buckets, furthest)
        assert torch.equal(ours(offset, buckets, furthest), theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_t5_layer_is_that_of_transformers(causal):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(d_model=16, d_kv=6, num_heads=3, dropout_rate=0.0, is_decoder=causal)
    config._attn_implementation = "eager"
    theirs = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    bucket = p.t5_causal_buckets if causal else p.t5_buckets
    inner = partial(causal_attention if causal else attention, scale=1.0)
    ours = MultiHeadAttention(16, 3, head_width=6, attend=p.T5Bias(3, inner, bucket), bias=False)
    with torch.no_grad():
        ours.to_qkv.weight.copy_(torch.cat([theirs.q.weight, theirs.k.weight, theirs.v.weight]))
        ours.to_out.weight.copy_(theirs.o.weight)
        ours.attend.table.copy_(theirs.relative_attention_bias.weight.normal_())
        x = torch.randn(2, 40, 16)
        mask = torch.zeros(1, 1, 40, 40)
        if causal:
            mask = mask.masked_fill(~causal_mask(40), -1e9)
        assert torch.allclose(ours(x), theirs(x, mask=mask)[0], atol=1e-5)


def test_t5_refuses_bad_buckets():
    with pytest.raises(ValueError, match="buckets cannot reach"):
        p.T5Bias(2, buckets=2)
    with pytest.raises(ValueError, match="distance 8"):
        p.t5_causal_buckets(torch.arange(3), buckets=32, furthest=8)
    with pytest.raises(NotImplementedError):
        p.RelativeBias()(*qkv(1, 1, 2, 2))
    with pytest.raises(NotImplementedError):
        p.ContentBias()(*qkv(1, 1, 2, 2))


@pytest.mark.parametrize("planes", [1, 2, 4])
@seeds
def test_the_two_pairings_differ_by_a_permutation(planes, seed):
    torch.manual_seed(seed)
    x, angle = torch.randn(2, 5, 8), torch.randn(5, planes)
    r = 2 * planes
    order = torch.cat([torch.arange(0, r, 2), torch.arange(1, r, 2), torch.arange(r, 8)])
    assert torch.allclose(p.rotate_halves(x[..., order], angle), p.rotate_pairs(x, angle)[..., order], atol=1e-6)
    turned = torch.view_as_complex(x[..., :r].unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones(()), angle)
    assert torch.allclose(p.rotate_pairs(x, angle)[..., :r], torch.view_as_real(turned).flatten(-2), atol=1e-6)
    assert torch.equal(p.rotate_pairs(x, angle)[..., r:], x[..., r:])


@pytest.mark.parametrize("rotate", [p.rotate_halves, p.rotate_pairs])
def test_rotation_keeps_lengths_and_depends_on_the_difference(rotate):
    q, k = torch.randn(2, 8, dtype=torch.float64)
    angle = torch.arange(50)[:, None] * p.rotary_speeds(8).double()
    q, k = (rotate(t.expand(50, 8), angle) for t in (q, k))
    assert torch.allclose(q.norm(dim=-1), q[0].norm().expand(50))
    scores = q @ k.T
    assert torch.allclose(scores[7, 3], scores[40, 36]) and not torch.allclose(scores[7, 3], scores[3, 7])


def test_rotary_layer_is_that_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, attention_bias=False)
    config._attn_implementation = "eager"
    theirs = llama.LlamaAttention(config, layer_idx=0).eval()
    ours = MultiHeadAttention(32, 4, attend=p.Rotary(8, causal_attention), bias=False)
    with torch.no_grad():
        ours.to_qkv.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.to_out.weight.copy_(theirs.o_proj.weight)
        x = torch.randn(2, 13, 32)
        turns = llama.LlamaRotaryEmbedding(config)(x, torch.arange(13)[None])
        mask = torch.zeros(1, 1, 13, 13).masked_fill(~causal_mask(13), -1e9)
        found = theirs(x, position_embeddings=turns, attention_mask=mask)[0]
    assert torch.allclose(ours(x), found, atol=1e-5)
    ours.attend.rotate = p.rotate_pairs
    assert not torch.allclose(ours(x), found, atol=1e-4)


def test_rotary_in_pairs_is_that_of_gptj():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    config = gptj.GPTJConfig(n_embd=32, n_head=4, rotary_dim=4, n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "eager"
    theirs = gptj.GPTJAttention(config, layer_idx=0).eval()
    attend = p.Rotary(8, causal_attention, speeds=p.rotary_speeds(4), rotate=p.rotate_pairs)
    ours = MultiHeadAttention(32, 4, attend=attend, bias=False)
    with torch.no_grad():
        ours.to_qkv.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.to_out.weight.copy_(theirs.out_proj.weight)
        x = torch.randn(2, 13, 32)
        mask = torch.zeros(1, 1, 13, 13).masked_fill(~causal_mask(13), -1e9)
        found = theirs(x, attention_mask=mask, position_ids=torch.arange(13)[None].expand(2, -1))[0]
    assert torch.allclose(ours(x), found, atol=1e-5)
    ours.attend.rotate = p.rotate_halves
    assert not torch.allclose(ours(x), found, atol=1e-4)


def test_partial_rotary_in_halves_is_that_of_gpt_neox():
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    x, angle = torch.randn(2, 3, 9, 8), torch.arange(9)[:, None] * p.rotary_speeds(4)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    theirs, _ = neox.apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.allclose(p.rotate_halves(x, angle), theirs, atol=1e-6)


def test_rotary_refuses_odd_widths_and_too_many_planes():
    with pytest.raises(ValueError, match="got 7"):
        p.rotary_speeds(7)
    with pytest.raises(ValueError, match="3 planes need 6 features; head_width is 4"):
        p.Rotary(4, speeds=torch.ones(3))
    for rotate in (p.rotate_halves, p.rotate_pairs):
        with pytest.raises(ValueError, match="3 angles turn 6 features; there are 4"):
            rotate(torch.zeros(2, 4), torch.zeros(2, 3))


def test_schemes_has_what_it_says():
    made = {name: make() for name, make in p.schemes(2, 4).items()}
    assert made["none"] is causal_attention
    assert isinstance(made["ALiBi"], p.Alibi) and made["rotary, pairs"].rotate is p.rotate_pairs


# --- shaw_relative


@sizes
@pytest.mark.parametrize("reach", [0, 1, 3])
def test_shaw_relative_equals_the_explicit_tensors(b, h, n, e, reach):
    q, k, v = qkv(b, h, n, e)
    scheme = randomized(p.ShawRelative(e, reach))
    index = p.relative_positions(n).clamp(-reach, reach) + reach

    def explicit(q, k, v):
        scores = torch.einsum("bhne,bhnme->bhnm", q, k.unsqueeze(2) + scheme.keys[index]) / e**0.5
        return torch.einsum("bhnm,bhnmc->bhnc", scores.softmax(-1), v.unsqueeze(2) + scheme.values[index])

    assert contracts.reduces_to(scheme, explicit, q, k, v)
    assert measure.parameters(scheme) == 2 * (2 * reach + 1) * e


@sizes
def test_shaw_relative_with_zero_tables_is_attention(b, h, n, e):
    zero = torch.zeros(5, e)
    assert contracts.agree(partial(p.shaw_attention, keys=zero, values=zero), attention, *qkv(b, h, n, e))


def test_shaw_relative_check_finds_offsets_upside_down():
    q, k, v = qkv(1, 1, 6, 4)
    scheme = randomized(p.ShawRelative(4, 2))
    flipped = partial(p.shaw_attention, keys=scheme.keys.flip(0), values=scheme.values.flip(0))
    assert not contracts.agree(flipped, scheme, q, k, v)
    with pytest.raises(ValueError, match="got -1"):
        p.ShawRelative(4, -1)


@pytest.mark.parametrize("n, m, reach", [(4, 4, 2), (2, 6, 3)])
def test_pick_and_collect_are_transposes(n, m, reach):
    index, rows = p.clipped_offsets(n, m, reach), 2 * reach + 1
    a, b = torch.randn(3, n, rows), torch.randn(3, n, m)
    assert torch.allclose((p.pick(a, index) * b).sum(), (a * p.collect(b, index, rows)).sum(), atol=1e-4)


# --- better_relative


@sizes
@seeds
def test_better_relative_method_4_is_the_expanded_product(b, h, n, e, seed):
    q, k, _ = qkv(b, h, n, e, seed)
    scheme = randomized(p.BetterRelative(e, 2))
    a = scheme.table[p.clipped_offsets(n, n, 2)]
    expanded = ((q.unsqueeze(-2) + a) * (k.unsqueeze(-3) + a)).sum(-1) - (a * a).sum(-1)
    assert torch.allclose(q @ k.mT / e**0.5 + scheme.bias(q, k), expanded / e**0.5, atol=1e-5)


@sizes
def test_better_relative_methods_1_to_3_multiply(b, h, n, e):
    q, k, _ = qkv(b, h, n, e)
    plain, index = q @ k.mT / e**0.5, p.clipped_offsets(n, n, 2)
    one, two = randomized(p.FactorByDistance(2)), randomized(p.FactorByOffset(2))
    three = randomized(p.FactorByFeature(e, 2))
    distance = p.relative_positions(n).abs().clamp(max=2)
    assert torch.allclose(plain + one.bias(q, k), plain * one.table[distance], atol=1e-5)
    assert torch.allclose(plain + two.bias(q, k), plain * two.table[index], atol=1e-5)
    by_feature = (q.unsqueeze(-2) * k.unsqueeze(-3) * three.table[index]).sum(-1) / e**0.5
    assert torch.allclose(plain + three.bias(q, k), by_feature, atol=1e-5)


def test_better_relative_needs_its_key_term():
    q, k, _ = qkv(1, 2, 6, 4)
    scheme = randomized(p.BetterRelative(4, 2))
    keys = p.ShawKeys(4, 2)
    keys.load_state_dict(scheme.state_dict())
    assert not torch.allclose(scheme.bias(q, k), keys.bias(q, k), atol=1e-3)
    key_term = torch.einsum("bhme,nme->bhnm", k, scheme.table[p.clipped_offsets(6, 6, 2)]) / 2
    assert torch.allclose(scheme.bias(q, k) - key_term, keys.bias(q, k), atol=1e-5)
    with pytest.raises(ValueError, match="got -2"):
        p.BetterRelative(4, -2)


# --- dynamic_relative


def statements(b, n, seed):
    torch.manual_seed(seed)
    return torch.randint(2, (b, n)).cumsum(1)


@pytest.mark.parametrize("n, seed", [(8, 0), (13, 1)])
def test_dynamic_relative_equals_the_masked_formula(n, seed):
    number = statements(2, n, seed)
    same = (number[:, :, None] == number[:, None])[:, None]
    q, k, v = qkv(2, 3, n, 4, seed)
    keys, values = torch.randn(2, 7, 4)
    index = p.clipped_offsets(n, n, 3)
    a_k, a_v = (table[index] * same[..., None] for table in (keys, values))  # (b, 1, n, n, e)
    scores = (q.unsqueeze(-2) * (k.unsqueeze(-3) + a_k)).sum(-1) / 2
    explicit = (scores.softmax(-1).unsqueeze(-1) * (v.unsqueeze(-3) + a_v)).sum(-2)
    assert torch.allclose(p.statement_attention(q, k, v, keys, values, same), explicit, atol=1e-5)


@seeds
def test_dynamic_relative_ignores_the_order_of_statements(seed):
    layer = randomized(p.StatementAttention(16, 2, 3), 0.3)
    number, x = statements(1, 12, seed), torch.randn(1, 12, 16)
    order = torch.cat([torch.where(number[0] == s)[0] for s in number[0].unique().flip(0)])
    found = layer(x[:, order], number[:, order])
    assert torch.allclose(found, layer(x, number)[:, order], atol=1e-5)
    inside = torch.cat([torch.where(number[0] == s)[0].flip(0) for s in number[0].unique()])
    assert not torch.allclose(layer(x[:, inside], number[:, inside]), layer(x, number)[:, inside], atol=1e-3)
    one = torch.zeros_like(number)  # one statement: Shaw's positions, which do see the order
    assert not torch.allclose(layer(x[:, order], one), layer(x, one)[:, order], atol=1e-3)


def test_dynamic_relative_with_one_statement_is_shaw_relative():
    layer = randomized(p.StatementAttention(16, 2, 3), 0.3)
    shaw = MultiHeadAttention(16, 2, attend=partial(p.shaw_attention, keys=layer.keys, values=layer.values))
    shaw.load_state_dict(layer.inner.state_dict())
    x = torch.randn(2, 9, 16)
    assert torch.allclose(layer(x, torch.zeros(2, 9, dtype=torch.long)), shaw(x), atol=1e-5)


# --- irpe


def official_index(x, alpha=1.9, beta=3.8, gamma=15.2):
    """Equation 18, number by number."""
    import math

    if abs(x) <= alpha:
        return round(x)
    far = min(int(beta), round(alpha + math.log(abs(x) / alpha) / math.log(gamma / alpha) * (beta - alpha)))
    return far if x > 0 else -far


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_irpe_piecewise_index(scale):
    given = (1.9 * scale, 3.8 * scale, 15.2 * scale)
    x = torch.arange(-30, 31).float()
    found = p.piecewise_index(x, *given)
    assert found.tolist() == [official_index(v, *given) for v in x.tolist()]
    assert bool((found.diff() >= 0).all()) and found.max() == int(3.8 * scale) == -found.min()
    with pytest.raises(ValueError, match="2.0, 1.0, 8.0"):
        p.piecewise_index(x, 2.0, 1.0, 8.0)


@pytest.mark.parametrize("height, width, extra", [(3, 5, 0), (4, 4, 1), (2, 6, 2)])
@pytest.mark.parametrize(
    "bucket", [p.product_buckets, p.euclidean_buckets, p.quantized_buckets, p.row_buckets, p.column_buckets]
)
def test_irpe_equals_the_explicit_tensor(height, width, extra, bucket):
    n = height * width + extra
    q, k, v = qkv(2, 2, n, 4)
    scheme = randomized(p.ImageRelative(4, height, width, bucket, extra))

    def explicit(q, k, v):
        scores = torch.einsum("bhne,bhnme->bhnm", q, k.unsqueeze(2) + scheme.table[scheme.index]) / 2
        return scores.softmax(-1) @ v

    assert contracts.reduces_to(scheme, explicit, q, k, v)
    plain = p.ImageRelative(4, height, width, bucket, extra)
    assert contracts.agree(plain, attention, q, k, v)


def test_irpe_index_depends_on_the_offset_alone():
    index = p.image_index(5, 6)
    seen = {}
    for i in range(30):
        for j in range(30):
            offset = (i // 6 - j // 6, i % 6 - j % 6)
            assert seen.setdefault(offset, index[i, j].item()) == index[i, j].item()
    assert index.max() < 49
    with_class = p.image_index(5, 6, extra=1)
    assert torch.equal(with_class[1:, 1:], index) and (with_class[0] == 49).all() and (with_class[:, 0] == 49).all()


def test_irpe_directions():
    offsets = p.grid_offsets(7, 7)
    turned = torch.stack([-offsets[..., 1], offsets[..., 0]], -1)  # by a quarter
    for bucket, blind in (
        (p.euclidean_buckets, True), (p.quantized_buckets, True), (p.product_buckets, False),
        (p.row_buckets, False), (p.column_buckets, False),
    ):  # fmt: skip
        assert torch.equal(bucket(offsets), bucket(turned)) is blind
        assert torch.equal(bucket(offsets), bucket(-offsets)) is blind


def test_irpe_cross_adds_rows_and_columns():
    q, k, v = qkv(2, 2, 12, 4)
    columns = randomized(p.ImageRelative(4, 3, 4, p.column_buckets))
    rows = randomized(p.ImageRelative(4, 3, 4, p.row_buckets, attend=columns))
    both = attention_weights(q, k, bias=columns.bias(q, k) + rows.bias(q, k)) @ v
    assert torch.allclose(rows(q, k, v), both, atol=1e-5)


def test_irpe_bias_mode_and_sizes():
    scheme = randomized(p.ImageBias(3, 2, 3))
    assert torch.allclose(scheme.bias(6, 6)[1, 4, 2], scheme.table[scheme.index[4, 2], 1])
    assert contracts.agree(p.ImageBias(3, 2, 3), attention, *qkv(1, 3, 6, 4))
    assert sum(measure.parameters(p.ImageRelative(64, 14, 14, extra=1)) for _ in range(12)) == 38_400
    for wrong in (p.ImageRelative(4, 2, 3), p.ImageBias(3, 2, 3)):
        with pytest.raises(ValueError, match="made for 6 tokens; got 7"):
            wrong(*qkv(1, 3, 7, 4))


def test_grid_rotary_depends_on_both_offsets():
    grid = p.GridRotary(8, 4, 5)
    q, k = torch.randn(2, 8)
    q, k = (p.rotate_halves(t.expand(20, 8), grid.angles(20)) for t in (q, k))
    scores = (q @ k.T).reshape(4, 5, 4, 5)
    assert torch.allclose(scores[0, 1, 2, 0], scores[1, 4, 3, 3], atol=1e-5)
    assert not torch.allclose(scores[0, 1, 2, 0], scores[0, 1, 1, 0], atol=1e-3)
    assert not torch.allclose(scores[0, 1, 2, 0], scores[0, 1, 2, 2], atol=1e-3)
    with pytest.raises(ValueError, match="4 x 5 places, and there are 7 tokens"):
        grid.angles(7)
    with pytest.raises(ValueError, match="6 is not divisible by 4"):
        p.GridRotary(6, 2, 2)


# --- urpe


def equal_tokens(make):
    torch.manual_seed(0)
    layers = nn.Sequential(*(randomized(MultiHeadAttention(16, 2, attend=make()), 0.3) for _ in range(3)))
    y = layers(torch.randn(1, 1, 16).expand(1, 14, 16))
    return ((y - y[:, :1]).abs().max() / y.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_urpe_only_factors_and_values_tell_equal_tokens_apart(name):
    gap = equal_tokens(lambda: causal_schemes(2, 8)[name])
    assert gap > 1e-3 if name in ("shaw", "urpe", "urpe_rotary") else gap < 1e-5


@sizes
@seeds
def test_urpe_equals_the_table_written_out(b, h, n, e, seed):
    q, k, v = qkv(b, h, n, e, seed)
    scheme = randomized(p.UniversalRelative(h, n + 3))
    c = scheme.factors
    table = torch.stack([torch.stack([c[:, j - i + n + 2] for j in range(n)], -1) for i in range(n)], -2)
    assert torch.allclose(scheme(q, k, v), (attention_weights(q, k) * table) @ v, atol=1e-5)
    assert contracts.reduces_to(p.UniversalRelative(h, n), attention, q, k, v)
    assert measure.parameters(scheme) == h * (2 * (n + 3) - 1)


def test_urpe_refuses_longer_texts():
    with pytest.raises(ValueError, match="up to 4 tokens; got 5"):
        p.UniversalRelative(2, 4)(*qkv(1, 2, 5, 4))
    with pytest.raises(ValueError, match="9 offsets; got 8 factors"):
        p.universal_attention(*qkv(1, 2, 5, 4), torch.ones(2, 8))


# --- complexformer


def phases(scheme, q, k):
    """Scores with the tensor of phases."""
    as_complex = lambda x: torch.complex(*x.chunk(2, -1))
    q, k = as_complex(q), as_complex(k)
    difference = q.angle().unsqueeze(-2) - k.angle().unsqueeze(-3)
    place = -p.relative_positions(q.shape[-2], k.shape[-2]).unsqueeze(-1) * scheme.speeds
    phase = scheme.stretch[:, None, None] * difference + scheme.shift[:, None, None] + place
    return (q.abs().unsqueeze(-2) * k.abs().unsqueeze(-3) * phase.cos()).sum(-1)


@pytest.mark.parametrize("b, h, n, m, e", [(2, 3, 7, 7, 8), (1, 2, 3, 9, 4)])
@seeds
def test_complexformer_equals_the_tensor_of_phases(b, h, n, m, e, seed):
    q, k, v = qkv(b, h, n, e, seed, m)
    scheme = randomized(p.ComplexRotary(h, e), 0.5)
    expected = (phases(scheme, q, k) / e**0.5).softmax(-1) @ v
    assert torch.allclose(scheme(q, k, v), expected, atol=1e-5)
    assert measure.parameters(scheme) == h * e


@sizes
def test_complexformer_starts_as_rotary(b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    assert contracts.reduces_to(p.ComplexRotary(h, e), p.Rotary(e), q, k, v, atol=5e-5)
    still = p.ComplexRotary(h, e, speeds=torch.zeros(e // 2))
    assert contracts.reduces_to(still, attention, q, k, v, atol=5e-5)


def test_complexformer_gradient_is_finite_at_zero():
    scheme = randomized(p.ComplexRotary(2, 4))
    x = torch.zeros(1, 2, 3, 4, requires_grad=True)
    scheme(x, x, torch.randn(1, 2, 3, 4)).sum().backward()
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match="got 5"):
        p.polar(torch.zeros(5))


# --- path_attention


def path_naive(q, k, w, beta):
    n = q.shape[-2]
    scores = torch.zeros(*q.shape[:-1], n, dtype=q.dtype)
    for i in range(n):
        carried = q[..., i, :]
        for j in range(i, -1, -1):
            scores[..., i, j] = (carried * k[..., j, :]).sum(-1)
            along = (carried * w[..., j, :]).sum(-1, keepdim=True)
            carried = carried - beta[..., j, None] * along * w[..., j, :]
    return scores


def path_inputs(n, e, seed):
    torch.manual_seed(seed)
    q, k, w = torch.randn(3, 2, n, e, dtype=torch.float64)
    return q, k, nn.functional.normalize(w, dim=-1), 2 * torch.rand(2, n, dtype=torch.float64)


@pytest.mark.parametrize("n, e, block", [(1, 4, 64), (9, 4, 64), (20, 6, 7), (33, 8, 16), (16, 3, 1)])
@seeds
def test_path_attention_compact_form_equals_the_product_of_maps(n, e, block, seed):
    given = path_inputs(n, e, seed)
    assert torch.allclose(p.path_scores(*given, block), path_naive(*given), atol=1e-9)


def test_path_attention_gradients_of_the_compact_form():
    q, k, w, beta = (t[:1].requires_grad_() for t in path_inputs(10, 4, 0))
    assert torch.autograd.gradcheck(partial(p.path_scores, block=4), (q, k, w, beta))


def test_path_attention_check_finds_the_reversed_order():
    q, k, w, beta = path_inputs(9, 4, 0)
    reversed_order = path_naive(q, k, w.flip(-2), beta.flip(-1))
    assert not torch.allclose(p.path_scores(q, k, w, beta), reversed_order, atol=1e-3)
    inclusive = path_naive(q, k - beta[..., None] * (k * w).sum(-1, keepdim=True) * w, w, beta)  # H_j as well
    assert not torch.allclose(p.path_scores(q, k, w, beta), inclusive, atol=1e-3)
    with pytest.raises(ValueError, match="got 0"):
        p.path_scores(q, k, w, beta, block=0)


@pytest.mark.parametrize("beta, kept", [(2.0, True), (0.0, True), (1.0, False)])
def test_path_attention_maps_of_strength_two_keep_lengths(beta, kept):
    _, k, w, _ = (t[0] for t in path_inputs(30, 5, 0))
    queries = torch.eye(5, dtype=torch.float64)[:, None].expand(5, 30, 5)
    strength = torch.full((5, 30), beta, dtype=torch.float64)
    carried = p.path_scores(queries, k.expand(5, 30, 5), w.expand(5, 30, 5), strength)[:, -1, 0]
    assert torch.allclose(carried.norm(), k[0].norm()) is kept


@pytest.mark.parametrize("n", [1, 2, 11])
def test_path_attention_layer(n):
    layer, x = p.PathAttention(16, 2, rank=8), torch.randn(2, n, 16)
    assert contracts.causal(layer, x)
    assert contracts.decodes_in_parallel(layer, layer.step, x)
    assert torch.allclose(layer.maps(x).sum(-1), torch.ones(2, 2, n), atol=1e-5)


def test_path_attention_without_strength_has_no_positions():
    layer = p.PathAttention(16, 2)
    with torch.no_grad():
        layer.project.strength.weight.zero_(), layer.project.strength.bias.fill_(-1e4)
    plain = MultiHeadAttention(16, 2, attend=causal_attention, bias=False)
    plain.load_state_dict({"to_qkv.weight": layer.project.to_qkv.weight, "to_out.weight": layer.to_out.weight})
    x = torch.randn(2, 9, 16)
    assert contracts.agree(layer, plain, x)
    real = (torch.arange(9) >= 3)[None, None, None]
    assert contracts.agree(lambda x: layer(x, mask=real), lambda x: plain(x, mask=real), x)
    with pytest.raises(ValueError, match="16 does not divide into 3"):
        p.PathAttention(16, 3)


def test_mechanisms_have_one_size():
    for make in p.mechanisms.values():
        module, (x, *_) = make()
        assert x.shape == (4, 128, 64) and module(*make()[1]).shape == x.shape


@pytest.mark.parametrize("rotate", [p.rotate_halves, p.rotate_pairs])
def test_rotary_at_places_that_the_caller_gives(rotate):
    q, k, v = torch.randn(3, 2, 3, 7, 8, dtype=torch.float64).unbind(0)
    turn = p.Rotary(8, causal_attention, p.rotary_speeds(8).double(), rotate)
    plain = turn(q, k, v)
    for shift in (torch.tensor([[0]]), torch.tensor([[5], [11]])):
        torch.testing.assert_close(turn(q, k, v, places=torch.arange(7) + shift), plain)
    places = torch.randint(30, (2, 7)).sort().values
    angle = places[:, None, :, None] * p.rotary_speeds(8).double()
    expected = causal_attention(rotate(q, angle), rotate(k, angle), v)
    torch.testing.assert_close(turn(q, k, v, places=places), expected)
    torch.testing.assert_close(turn(q[:, :, -2:], k, v, places=places), expected[:, :, -2:])
    assert not torch.allclose(expected, plain, atol=1e-3)
    for wrong in (places[:, 1:], places[0]):
        with pytest.raises(ValueError, match="7 keys have places"):
            turn(q, k, v, places=wrong)


def test_places_go_through_a_layer_and_its_maps_also_in_pieces():
    layer = MultiHeadAttention(16, 2, attend=p.Rotary(8, causal_attention)).double()
    layer.attend.speeds = layer.attend.speeds.float()
    x, places = torch.randn(2, 6, 16).double(), torch.randint(30, (2, 6)).sort().values
    whole = layer(x, places=places)
    q, k, _ = layer.project(x)
    angle = places[:, None, :, None] * p.rotary_speeds(8)
    turned = attention_weights(p.rotate_halves(q, angle), p.rotate_halves(k, angle), causal_mask(6))
    torch.testing.assert_close(layer.maps(x, places=places), turned)
    with remember(layer):
        pieces = [layer(x[:, a:b], places=places[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 6))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)

"""Chapter 09: every variant against its formula on random shapes, published models, and a broken twin."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.zoo import attention_variants as z
from tfkit.zoo.attention import (
    MultiHeadAttention,
    attention,
    attention_weights,
    causal_attention,
    causal_mask,
    padding_mask,
)
from tfkit.zoo.positions import Rotary, rotary_speeds
from tfkit.zoo.transformer import Stack, TokenEmbedding, generate, language_model, remember

SIZES = [(2, 4, 7, 8), (1, 2, 12, 4), (3, 6, 5, 3)]  # batch, heads, tokens, head width
sizes = pytest.mark.parametrize("b, h, n, e", SIZES)
CAUSAL = {"attend": causal_attention, "bias": False}


@pytest.fixture(params=[0, 1, 2])
def seed(request):
    torch.manual_seed(request.param)
    return request.param


def qkv(b, h, n, e, m=None):
    m = n if m is None else m
    return torch.randn(b, h, n, e), torch.randn(b, h, m, e), torch.randn(b, h, m, e)


def randomized(module, scale=0.5):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def put(layer, attend):
    """Another attend function, or module, into the slot of a layer."""
    del layer.attend
    layer.attend = attend


def pairs(q, k, v):
    """Both maps (b, h, 2, n, m) of a differential layer with full sight."""
    return attention_weights(q, k).unflatten(1, (-1, 2)).unbind(2)


def first_map(q, k, v):
    return attention(q[:, ::2], k[:, ::2], v)


def causal_layers(width=24):
    """Every causal layer of the chapter, with parameters that are not at their start."""
    h = 4
    sink = z.SinkLogit(h, 1.0, causal_attention)
    pairless = partial(z.self_gated_attention, attend=causal_attention)
    by_one = partial(z.off_by_one_attention, attend=causal_attention)
    grouped = z.Causal(z.grouped_attention)
    made = {
        "grouped": z.GroupedQueryAttention(width, h, 2, attend=grouped),
        "multi_query": z.GroupedQueryAttention(width, h, 1, attend=grouped, bias=False),
        "talking": MultiHeadAttention(width, h, attend=z.Causal(z.TalkingHeads(h))),
        "off_by_one": MultiHeadAttention(width, h, attend=by_one),
        "sink": MultiHeadAttention(width, h, attend=sink),
        "gated": z.GatedAttention(width, h, **CAUSAL),
        "differential": z.DifferentialAttention(width, 2, 3, **CAUSAL),
        "shared_diff": z.SharedDifferentialAttention(width, 2, 3, layer=2, **CAUSAL),
        "dint": z.DINTAttention(width, 2, 2, average=z.running_mean, **CAUSAL),
        "taylor": MultiHeadAttention(width, h, attend=z.Causal(z.taylor_attention)),
        "rcmha": z.rcmha(width, h, length=30),
        "pairless": MultiHeadAttention(width, h, attend=pairless),
        "generative": z.Generative(),
        "generative_with_context": z.GenerativeWithContext(),
    }
    return {name: randomized(layer, 0.2) for name, layer in made.items()}


LAYERS = list(causal_layers())
CACHED = [name for name in LAYERS if name not in ("pairless", "generative", "generative_with_context")]


@pytest.mark.parametrize("name", LAYERS)
def test_every_causal_layer_is_causal(seed, name):
    assert contracts.causal(causal_layers()[name], torch.randn(2, 8, 24))


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("rcmha", "pairless") and "generative" not in n])
def test_causality_is_lost_without_a_causal_attend(name):
    layer = causal_layers()[name]
    blind = {"grouped": z.grouped_attention, "multi_query": z.grouped_attention, "taylor": z.taylor_attention}
    inner = getattr(layer.attend, "attend", None)
    if isinstance(layer.attend, z.Causal):
        put(layer, blind.get(name, inner))
    elif isinstance(layer.attend, z.SinkLogit):
        put(layer.attend, attention)
    else:
        put(layer, z.off_by_one_attention if name == "off_by_one" else attention)
    assert not contracts.causal(layer, torch.randn(2, 8, 24))


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [2, 7]])
def test_reading_in_pieces_with_a_cache_changes_nothing(name, pieces):
    torch.manual_seed(0)
    layer, x = causal_layers()[name], torch.randn(2, 9, 24)
    with torch.no_grad():
        whole = layer(x)
        with remember(layer):
            found = torch.cat([layer(piece) for piece in x.split(pieces, 1)], 1)
        assert torch.allclose(found, whole, atol=1e-5)
        assert torch.allclose(layer(x), whole, atol=1e-6), "nothing is left over from `remember`"


@pytest.mark.parametrize("name", ["dint", "rcmha"])
def test_a_cache_of_keys_alone_is_caught(name, monkeypatch):
    layer, x = causal_layers()[name], torch.randn(2, 6, 24)
    monkeypatch.setattr(z, "recall", lambda layer: None)  # so nothing beside keys and values is kept
    with torch.no_grad(), remember(layer):
        found = torch.cat([layer(x[:, t : t + 1]) for t in range(6)], 1)
    assert not torch.allclose(found, layer(x), atol=1e-3)


@pytest.mark.parametrize("name", ["grouped", "talking", "off_by_one", "gated", "differential", "shared_diff", "taylor"])
def test_padding_is_not_seen(seed, name):
    layer = causal_layers()[name]
    blind = {
        "grouped": z.grouped_attention,
        "talking": getattr(layer.attend, "attend", None),
        "off_by_one": z.off_by_one_attention,
        "taylor": z.taylor_attention,
    }
    put(layer, blind.get(name, attention))
    x, real = torch.randn(2, 6, 24), torch.arange(6) < torch.tensor([[6], [4]])
    assert contracts.padding_invariant(lambda x, real: layer(x, padding_mask(real)), x, real)
    assert not contracts.padding_invariant(lambda x, real: layer(x), x, real)


# ---------------------------------------------------------------------------------- shared keys, talking heads, sinks


@sizes
@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_attention_is_attention_with_copied_keys(seed, b, h, n, e, groups):
    q, k, v = torch.randn(b, h, n, e), torch.randn(b, groups, n + 2, e), torch.randn(b, groups, n + 2, e + 1)
    many = lambda t: t.repeat_interleave(h // groups, 1)
    assert contracts.reduces_to(z.grouped_attention, lambda q, k, v: attention(q, many(k), many(v)), q, k, v)
    mask, bias = torch.rand(n, n + 2) < 0.7, torch.randn(h, n, n + 2)
    mask[:, 0] = True
    ours = partial(z.grouped_attention, mask=mask, bias=bias, scale=0.3)
    theirs = lambda q, k, v: attention(q, many(k), many(v), mask, bias, 0.3)
    assert contracts.agree(ours, theirs, q, k, v)
    if 1 < groups < h:
        tiled = lambda q, k, v: attention(q, k.repeat(1, h // groups, 1, 1), v.repeat(1, h // groups, 1, 1))
        assert not contracts.agree(z.grouped_attention, tiled, q, k, v, atol=1e-3)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_grouped_and_multi_query_equal_llama(seed, groups):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": groups}
    config = llama.LlamaConfig(**sizes, attention_bias=True, attn_implementation="eager")
    theirs = llama.LlamaAttention(config, 0).eval()
    ours = z.GroupedQueryAttention(24, 4, groups, attend=z.Causal(z.grouped_attention))
    copy_projections(theirs, ours)
    x = torch.randn(2, 7, 24)
    assert contracts.agree(ours, published(theirs, 7, 6), x)
    put(ours, z.grouped_attention)
    assert not contracts.agree(ours, published(theirs, 7, 6), x, atol=1e-3)


def copy_projections(theirs, ours):
    three = [getattr(theirs, f"{name}_proj") for name in "qkv"]
    with torch.no_grad():
        ours.to_qkv.weight.copy_(torch.cat([part.weight for part in three]))
        ours.to_out.weight.copy_(theirs.o_proj.weight)
        if ours.to_qkv.bias is not None:
            ours.to_qkv.bias.copy_(torch.cat([part.bias for part in three]))
            ours.to_out.bias.copy_(theirs.o_proj.bias)


def published(theirs, n, e):
    """A layer of `transformers` as a function of x: causal, with rotary positions switched off."""
    future = torch.zeros(1, 1, n, n).masked_fill(~causal_mask(n), -torch.inf)
    return lambda x: theirs(x, (torch.ones(x.shape[0], n, e), torch.zeros(x.shape[0], n, e)), future)[0]


def test_learned_sink_equals_gpt_oss(seed):
    code = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
    config = code.GptOssConfig(**sizes, num_hidden_layers=2, attention_bias=True, attn_implementation="eager")
    theirs = code.GptOssAttention(config, 1).eval()
    nn.init.normal_(theirs.sinks)
    ours = MultiHeadAttention(24, 4, attend=z.SinkLogit(4, attend=causal_attention))
    copy_projections(theirs, ours)
    x = torch.randn(2, 7, 24)
    assert not contracts.agree(ours, published(theirs, 7, 3), x, atol=1e-3)  # a sink of score 0 is another function
    ours.attend.logit.data.copy_(theirs.sinks)
    assert contracts.agree(ours, published(theirs, 7, 3), x)


def test_output_gate_equals_qwen3_next(seed):
    code = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
    config = code.Qwen3NextConfig(**sizes, num_hidden_layers=4, attn_implementation="eager")
    theirs = code.Qwen3NextAttention(config, 3).eval()
    theirs.q_norm = theirs.k_norm = nn.Identity()  # norms of queries and keys are chapter 05
    ours = z.GatedAttention(24, 4, **CAUSAL)
    both = theirs.q_proj.weight.detach().unflatten(0, (4, 2, 6))  # (h, query or gate, e, d)
    with torch.no_grad():
        rows = [both[:, 0].flatten(0, 1), theirs.k_proj.weight, theirs.v_proj.weight]
        ours.to_qkv.weight.copy_(torch.cat(rows))
        ours.to_gate.weight.copy_(both[:, 1].flatten(0, 1))
        ours.to_out.weight.copy_(theirs.o_proj.weight)
    x = torch.randn(2, 7, 24)
    assert contracts.agree(ours, published(theirs, 7, 6), x)
    ours.to_gate.weight.data.neg_()
    assert not contracts.agree(ours, published(theirs, 7, 6), x, atol=1e-3)


@pytest.mark.parametrize("heads, head_width, bias", [(4, None, True), (6, 5, False)])
def test_grouping_a_trained_layer(seed, heads, head_width, bias):
    layer, x = MultiHeadAttention(24, heads, head_width, bias=bias), torch.randn(2, 7, 24)
    assert contracts.agree(z.group_heads(layer, heads), layer, x)
    for groups in (1, 2):
        new = z.group_heads(layer, groups)
        q, k, v = layer.project(x)
        k, v = (t.unflatten(1, (groups, -1)).mean(2) for t in (k, v))
        for ours, mean in zip(new.project(x), (q, k, v), strict=True):
            assert torch.allclose(ours, mean, atol=1e-5)
    with torch.no_grad():
        layer.to_qkv.weight[-1] += 1.0
    assert not contracts.agree(z.group_heads(layer, heads), new, x, atol=1e-3)


def test_grouped_cache_writes_the_same_and_is_small(seed):
    mixer = lambda: z.GroupedQueryAttention(16, 4, 2, attend=z.Causal(z.grouped_attention))
    model, ids = language_model(13, 16, 2, mixer=mixer), torch.randint(13, (2, 4))
    longer = generate(model, ids, 5)
    for t in range(4, 9):
        assert torch.equal(longer[:, t], model(longer[:, :t])[:, -1].argmax(-1))
    layer = mixer()
    with remember(layer) as past:
        layer(torch.randn(1, 10, 16))
        assert past.numbers() == 2 * 2 * 10 * 4


@sizes
def test_talking_heads_equal_loops_over_heads(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    before, after = torch.randn(2, h, h).unbind(0)
    scores = [q[:, g] @ k[:, g].transpose(-2, -1) / math.sqrt(e) for g in range(h)]
    weights = [sum(before[i, g] * scores[g] for g in range(h)).softmax(-1) for i in range(h)]
    expected = torch.stack([sum(after[i, g] * weights[g] for g in range(h)) @ v[:, i] for i in range(h)], 1)
    assert torch.allclose(z.talking_heads(q, k, v, before, after), expected, atol=1e-4)
    assert not torch.allclose(z.talking_heads(q, k, v, before.T, after, None), expected, atol=1e-3)
    silent = partial(z.talking_heads, before=torch.eye(h), after=torch.eye(h))
    assert contracts.reduces_to(silent, attention, q, k, v)
    closed = torch.ones(n, n, dtype=torch.bool)
    closed[0] = False
    assert (silent(q, k, v, mask=closed)[:, :, 0] == 0).all()


@sizes
def test_sink_takes_its_share_of_the_softmax(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    logit = torch.randn(h)
    grown = (q @ k.transpose(-2, -1) / math.sqrt(e)).exp()
    expected = grown / (logit.exp()[:, None, None] + grown.sum(-1, keepdim=True)) @ v
    assert torch.allclose(z.sink_attention(q, k, v, logit), expected, atol=1e-5)
    one = grown / (1 + grown.sum(-1, keepdim=True)) @ v
    assert torch.allclose(z.off_by_one_attention(q, k, v), one, atol=1e-5)
    assert torch.allclose(z.sink_attention(q, k, v, torch.full((h,), -1e4)), attention(q, k, v), atol=1e-6)
    assert not torch.allclose(attention(q, k, v), expected, atol=1e-3)
    masked = z.sink_attention(q, k, v, logit, causal_mask(n))
    assert torch.allclose(z.sink_attention(q, k, v, logit, attend=causal_attention), masked, atol=1e-6)


def test_a_sink_behind_the_words_is_caught(seed):
    q, k, v = qkv(2, 3, 6, 4)
    behind = [F.pad(t, (0, 0, 0, 1)) for t in (k, v)]
    wrong = causal_attention(F.pad(q, (0, 0, 0, 1)), *behind)[:, :, :-1]  # the sink is in the future of every word
    right = z.sink_attention(q, k, v, torch.zeros(3), attend=causal_attention)
    assert not torch.allclose(wrong, right, atol=1e-3)
    assert torch.allclose(wrong, causal_attention(q, k, v), atol=1e-6), "so it does nothing at all"


def test_an_open_gate_is_plain_attention(seed):
    layer, x = z.GatedAttention(16, 4), torch.randn(2, 5, 16)
    plain = MultiHeadAttention(16, 4)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "gate" not in k})
    assert not contracts.agree(layer, plain, x, atol=1e-3)
    layer.to_gate.weight.data.zero_(), layer.to_gate.bias.data.fill_(30.0)
    assert contracts.agree(layer, plain, x)
    assert measure.parameters(layer) - measure.parameters(plain) == 16 * 16 + 16


# ---------------------------------------------------------------------------------------------------- differential


@sizes
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, -0.5])
def test_differential_is_the_difference_of_two_softmax_maps(b, h, n, e, lam):
    q, k, _ = qkv(b, h, n, e)
    v = torch.randn(b, h // 2, n, 2 * e)
    first, second = pairs(q, k, v)
    assert torch.allclose(z.differential_attention(q, k, v, lam), (first - lam * second) @ v, atol=1e-5)
    eye = torch.eye(n).expand(b, h // 2, n, n)
    rows = z.differential_attention(q, k, eye, lam).sum(-1)
    assert torch.allclose(rows, torch.tensor(1 - lam), atol=1e-5)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(e)).unflatten(1, (-1, 2))
    mixed = (scores[:, :, 0] - lam * scores[:, :, 1]).softmax(-1) @ v  # a difference of scores is another thing
    assert lam == 0 or not torch.allclose(z.differential_attention(q, k, v, lam), mixed, atol=1e-3)


@sizes
def test_differential_special_cases(seed, b, h, n, e):
    q, k, _ = qkv(b, h, n, e)
    v = torch.randn(b, h // 2, n, 2 * e)
    assert contracts.reduces_to(partial(z.differential_attention, lam=0.0), first_map, q, k, v)
    twice = lambda t: t[:, ::2].repeat_interleave(2, 1)
    equal = lambda q, k, v: z.differential_attention(twice(q), twice(k), v, lam=0.7)
    assert contracts.agree(equal, lambda q, k, v: 0.3 * first_map(q, k, v), q, k, v)
    assert not contracts.agree(partial(z.differential_attention, lam=0.7), equal, q, k, v, atol=1e-3)


@pytest.mark.parametrize("width, heads", [(32, 2), (24, 3), (16, 1)])
def test_differential_layer_is_its_formula_and_has_the_published_size(seed, width, heads):
    layer, x = randomized(z.DifferentialAttention(width, heads, layer=4)), torch.randn(2, 7, width)
    e = width // heads // 2
    q, k, v = layer.project(x)
    assert q.shape == (2, 2 * heads, 7, e) and v.shape == (2, heads, 7, 2 * e)
    start = 0.8 - 0.6 * math.exp(-0.3 * 3)
    lam = (layer.lambda_q[0] @ layer.lambda_k[0]).exp() - (layer.lambda_q[1] @ layer.lambda_k[1]).exp() + start
    first, second = pairs(q, k, v)
    heads_out = (first - lam * second) @ v
    normed = heads_out / (heads_out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight * (1 - start)
    expected = normed.transpose(1, 2).flatten(2) @ layer.to_out.weight.T
    assert torch.allclose(layer(x), expected, atol=1e-4)
    plain = MultiHeadAttention(width, 2 * heads, bias=False)
    assert measure.parameters(layer) == measure.parameters(plain) + 4 * e + 2 * e


@pytest.mark.parametrize("index", [0, 3])
def test_differential_equals_diffllama(seed, index):
    code = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
    config = code.DiffLlamaConfig(**sizes, rms_norm_eps=1e-5, attn_implementation="eager")
    theirs, x = code.DiffLlamaAttention(config, index).eval(), torch.randn(2, 7, 48)
    order = [0, 3, 1, 4, 2, 5]  # theirs: all first maps, then all second maps

    def copied(layer):
        rows = [getattr(theirs, f"{name}_proj").weight.unflatten(0, (6, 8))[order].flatten(0, 1) for name in "qkv"]
        with torch.no_grad():
            layer.to_qkv.weight.copy_(torch.cat(rows))
            layer.to_out.weight.copy_(theirs.o_proj.weight)
            layer.lambda_q.copy_(torch.stack([theirs.lambda_q1, theirs.lambda_q2]))
            layer.lambda_k.copy_(torch.stack([theirs.lambda_k1, theirs.lambda_k2]))
        return layer

    make = lambda layer: copied(z.DifferentialAttention(48, 3, layer=layer, **CAUSAL))
    assert contracts.agree(make(index + 1), published(theirs, 7, 8), x)
    assert not contracts.agree(make(index + 2), published(theirs, 7, 8), x, atol=1e-3)


@pytest.mark.parametrize("heads, groups", [(4, 1), (4, 2), (6, 3), (2, 2)])
def test_differential_pairs_may_share_their_keys(seed, heads, groups):
    e, times = 4, heads // groups
    layer = randomized(z.DifferentialAttention(2 * heads * e, heads, 2, groups=groups, **CAUSAL))
    full = z.DifferentialAttention(2 * heads * e, heads, 2, **CAUSAL)  # with a copy of the keys for each pair
    q, k, v = layer.to_qkv.weight.split([2 * heads * e, 2 * groups * e, 2 * groups * e])
    copied = lambda t: t.unflatten(0, (groups, 2 * e)).repeat_interleave(times, 0).flatten(0, 1)
    weights = {**layer.state_dict(), "to_qkv.weight": torch.cat([q, copied(k), copied(v)])}
    full.load_state_dict(weights)
    x, mask = torch.randn(2, 7, 2 * heads * e), torch.rand(2, 2 * heads, 7, 7) > 0.3
    assert contracts.agree(layer, full, x)
    assert contracts.agree(partial(layer, mask=mask), partial(full, mask=mask), x)
    torch.testing.assert_close(layer.maps(x), full.maps(x))
    assert layer.project(x)[1].shape == (2, 2 * groups, 7, e)
    with pytest.raises(ValueError, match=f"{heads} pairs.*{heads + 1}"):
        z.DifferentialAttention(2 * heads * e, heads, groups=heads + 1)
    with pytest.raises(ValueError, match=r"\[4, 4, 1\]"):
        z.differential_attention(*torch.randn(2, 1, 4, 3, 2).unbind(0), torch.randn(1, 1, 3, 4), 0.5)


@pytest.mark.parametrize("heads, rank", [(2, 1), (2, 3), (3, 2)])
def test_shared_diff_without_updates_is_scaled_attention(seed, heads, rank):
    layer, x = z.SharedDifferentialAttention(24, heads, rank, layer=3), torch.randn(2, 7, 24)
    nn.init.normal_(layer.up)
    plain = lambda x: (1 - layer.lam()) * first_map(*layer.project(x))
    before_norm = lambda x: layer.combine(*layer.project(x), None)
    assert not contracts.agree(before_norm, plain, x, atol=1e-3)
    nn.init.zeros_(layer.up)
    assert contracts.reduces_to(before_norm, plain, x)
    d, e = 24, 12 // heads
    same = z.DifferentialAttention(24, heads, layer=3)
    saved = measure.parameters(same) - measure.parameters(layer)
    assert saved == heads * (4 * d * e - 2 * d * e - 4 * rank * (d + e))


@pytest.mark.parametrize("width, heads", [(16, 2), (24, 3)])
def test_shared_diff_is_its_formula(seed, width, heads):
    layer, x = randomized(z.SharedDifferentialAttention(width, heads, 2)), torch.randn(2, 5, width)
    e = width // heads // 2
    w = layer.to_qkv.weight.split([heads * e, heads * e, 2 * heads * e])
    q, k, v = layer.project(x)
    for found, base, down, up in zip((q, k), w[:2], layer.down, layer.up, strict=True):
        for h in range(heads):
            for i in range(2):
                matrix = base[h * e : (h + 1) * e].T + down[h, i] @ up[h, i]
                assert torch.allclose(found[:, 2 * h + i], x @ matrix, atol=1e-4)
    assert torch.allclose(v.transpose(1, 2).flatten(2), x @ w[2].T, atol=1e-5)


def test_shared_diff_with_full_rank_is_any_differential_layer(seed):
    full = randomized(z.DifferentialAttention(16, 2, layer=2))
    whole, x = z.SharedDifferentialAttention(16, 2, rank=4, layer=2), torch.randn(2, 6, 16)
    assert not contracts.agree(whole, full, x, atol=1e-3)
    with torch.no_grad():
        whole.down.copy_(full.to_qkv.weight.unflatten(0, (3, 2, 2, 4))[:2].transpose(-2, -1))
        whole.up.copy_(torch.eye(4).expand_as(whole.up))
        whole.to_qkv.weight.zero_()
        whole.to_qkv.weight[-16:].copy_(full.to_qkv.weight[-16:])
        for name in ("lambda_q", "lambda_k", "norm.weight", "to_out.weight"):
            whole.get_parameter(name).copy_(full.get_parameter(name))
    assert contracts.agree(whole, full, x)


@pytest.mark.parametrize("start", [-2.0, 0.0, 0.4, 5.0])
@pytest.mark.parametrize("n", [1, 6, 11])
def test_dint_rows_sum_to_one_for_any_lambda(seed, start, n):
    layer, x = randomized(z.DINTAttention(24, 3)), torch.randn(2, n, 24)
    layer.start = start
    q, k, v = layer.project(x)
    first, second = pairs(q, k, v)
    literal = first + layer.lam() * (first.mean(-2, keepdim=True) - second)
    assert torch.allclose(layer.maps(x), literal, atol=1e-5)
    assert torch.allclose(layer.maps(x).sum(-1), torch.ones(()), atol=1e-5)
    plain = z.DifferentialAttention(24, 3)
    plain.load_state_dict(layer.state_dict())
    plain.start = start
    assert torch.allclose(plain.maps(x).sum(-1), 1 - layer.lam(), atol=1e-4)


def test_dint_without_lambda_is_attention(seed):
    layer, x = z.DINTAttention(24, 3), torch.randn(2, 6, 24)
    layer.start -= layer.lam().item()
    before_norm = lambda x: layer.combine(*layer.project(x), None)
    assert contracts.agree(before_norm, lambda x: first_map(*layer.project(x)), x)
    layer.start += 0.3
    assert not contracts.agree(before_norm, lambda x: first_map(*layer.project(x)), x, atol=1e-3)


def test_dint_causal_trap(seed):
    x = torch.randn(2, 7, 16)
    leaking = z.DINTAttention(16, 2, layer=4, **CAUSAL)
    sound = z.DINTAttention(16, 2, layer=4, average=z.running_mean, **CAUSAL)
    sound.load_state_dict(leaking.state_dict())
    assert not contracts.causal(leaking, x)
    assert contracts.causal(sound, x)
    assert torch.allclose(sound.maps(x).sum(-1), torch.ones(()), atol=1e-5)
    assert not torch.allclose(leaking.maps(x).tril().sum(-1), torch.ones(()), atol=1e-2)
    first = attention_weights(*leaking.project(x)[:2], causal_mask(7)).unflatten(1, (2, 2))[:, :, 0]
    rows = torch.stack([first[:, :, : i + 1].mean(2) for i in range(7)], 2)
    assert torch.allclose(z.running_mean(first), rows, atol=1e-6)


def test_dint_mean_of_all_counts_padding():
    """A warning for encoders, stated in the docstring: rows of padding take part in the published mean."""
    torch.manual_seed(0)
    layer, x = z.DINTAttention(16, 2, layer=4), torch.randn(2, 6, 16)
    real = torch.arange(6) < torch.tensor([[6], [4]])
    assert not contracts.padding_invariant(lambda x, real: layer(x, padding_mask(real)), x, real)


# --------------------------------------------------------------------------------------------- deconstructing attention


def spied(seen):
    def attend(q, k, v, mask=None):
        seen.append(attention_weights(q, k, causal_mask(q.shape[-2])))
        return causal_attention(q, k, v, mask)

    return attend


@pytest.mark.parametrize("kind", ["random", "text"])
def test_deconstructing_attention_fixed_maps_ignore_the_input(seed, kind):
    seen = []
    layers = [z.FixedMapAttention(16, 2, attend=spied(seen)) for _ in range(3)]
    embed = TokenEmbedding(9, 16)
    reference = {
        "random": lambda: z.RandomReference(8, 16),
        "text": lambda: z.TextReference(embed, torch.randint(9, (8,))),
    }[kind]()
    model = z.ReferenceStack(Stack(layers), reference)
    a, b = model(torch.randn(2, 7, 16)), model(torch.randn(2, 7, 16))
    assert a.shape == (2, 7, 16) and not torch.allclose(a, b)
    for i in range(3):
        assert torch.equal(seen[i], seen[i + 3])
        assert torch.equal(seen[i], seen[i][:1].expand_as(seen[i]))
    assert contracts.causal(model, torch.randn(2, 7, 16))
    assert measure.parameters(layers[0]) == measure.parameters(MultiHeadAttention(16, 2))


def test_deconstructing_attention_maps_that_follow_the_input_are_caught():
    seen = []
    model = Stack([MultiHeadAttention(16, 2, attend=spied(seen))])
    model(torch.randn(2, 7, 16)), model(torch.randn(2, 7, 16))
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


@sizes
def test_deconstructing_attention_taylor_is_its_formula_and_linear(seed, b, h, n, e):
    q, k, v = (t.double() for t in qkv(b, h, n, e))
    s = q @ k.transpose(-2, -1) / math.sqrt(e)
    weights = 1 + s + s**2 / 2
    assert (weights > 0).all()
    expected = weights / weights.sum(-1, keepdim=True) @ v
    assert torch.allclose(z.taylor_attention(q, k, v), expected, atol=1e-5)

    def features(x):
        x = x * e**-0.25
        return torch.cat(
            [torch.ones_like(x[..., :1]), x, torch.einsum("...a,...b->...ab", x, x).flatten(-2) / 2**0.5], -1
        )

    fq, fk = features(q), features(k)
    linear = fq @ (fk.transpose(-2, -1) @ v) / (fq @ fk.sum(-2).unsqueeze(-1))
    assert torch.allclose(expected, linear, atol=1e-4)
    assert torch.allclose(z.taylor_attention(0.02 * q, k, v), attention(0.02 * q, k, v), atol=1e-4)
    assert not torch.allclose(z.taylor_attention(3 * q, k, v), attention(3 * q, k, v), atol=1e-2)


@sizes
def test_deconstructing_attention_without_pairs_is_a_running_mean(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    weight = ((F.silu(q) * k).sum(-1, keepdim=True) / math.sqrt(e)).exp()
    ours = partial(z.self_gated_attention, attend=causal_attention)
    running = (weight * v).cumsum(-2) / weight.cumsum(-2)
    assert torch.allclose(ours(q, k, v), running, atol=1e-5)
    whole = (weight * v).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True)
    assert torch.allclose(z.self_gated_attention(q, k, v), whole.expand_as(v), atol=1e-5)
    assert not torch.allclose(causal_attention(q, k, v), running, atol=1e-3)


def test_deconstructing_attention_static_maps_come_from_the_embeddings(seed):
    first, second = (z.StaticMapAttention(16, 2, **CAUSAL) for _ in range(2))
    plain, x = MultiHeadAttention(16, 2, **CAUSAL), torch.randn(2, 6, 16)
    plain.load_state_dict(first.state_dict())
    assert contracts.agree(z.StaticStack(Stack([first])), plain, x)
    plain.load_state_dict(second.state_dict())
    both = z.StaticStack(Stack([first, second]))
    state = first(x, source=x)
    q, k, _ = second.project(x)
    expected = second.to_out(causal_attention(q, k, second.project(state)[2]).transpose(1, 2).flatten(2))
    assert torch.allclose(both(x), expected, atol=1e-5)
    assert not torch.allclose(both(x), plain(state), atol=1e-3)
    hybrid = z.StaticStack(Stack([first, z.WithoutSource(plain)]))
    assert torch.allclose(hybrid(x), plain(state), atol=1e-6)


@pytest.mark.parametrize("width", [48, 96])
def test_deconstructing_attention_variants_have_equal_size(width):
    parts = (MultiHeadAttention, z.FixedMapAttention, z.StaticMapAttention)
    counts = {measure.parameters(part(width, 4, bias=False)) for part in parts}
    mlp = z.GatedMLP(width)
    assert counts | {measure.parameters(mlp)} == {4 * width**2}
    x = torch.randn(2, 5, width)
    assert contracts.local(mlp, x, window=0)
    assert torch.allclose(mlp(x), mlp.down(F.silu(mlp.gate(x)) * mlp.up(x)))


# ------------------------------------------------------------------------------------------------------ wide attention


@pytest.mark.parametrize("width, heads, head_width, hidden", [(32, 12, 8, 64), (24, 6, 5, None)])
def test_wide_attention_counts(width, heads, head_width, hidden):
    attend, feed = set(), {}
    for layers in (1, 2, 3):
        model = z.wide_classifier(20, 3, width, layers, heads // layers, head_width, hidden)
        attend.add(sum(measure.parameters(b.mix.part) for b in model.stack.blocks))
        feed[layers] = sum(measure.parameters(b.feed.part) for b in model.stack.blocks)
    assert attend == {4 * width * heads * head_width}
    assert feed[2] == 2 * feed[1] and feed[3] == 3 * feed[1]
    narrow = MultiHeadAttention(width, heads, bias=False) if width % heads == 0 else None  # heads that share the width
    assert narrow is None or 4 * width * heads * head_width != measure.parameters(narrow)


def test_wide_attention_reads_all_words_and_ignores_no_order(seed):
    model = z.wide_classifier(20, 3, 16, 1, 6, head_width=4).eval()
    ids = torch.randint(20, (4, 9))
    assert model(ids).shape == (4, 3)
    for place in (0, 4, 8):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 20
        assert not torch.allclose(model(changed), model(ids), atol=1e-6)
    assert not torch.allclose(model(ids.flip(1)), model(ids), atol=1e-5), "positions count"


# ----------------------------------------------------------------------------------------------- generative function


@pytest.mark.parametrize("compare", [torch.minimum, torch.maximum, lambda a, b: (a + b) / 2])
def test_generative_function_equals_a_loop(seed, compare):
    x = torch.randn(3, 7, 5)
    y = torch.stack([compare(x[:, t], x[:, max(t - 1, 0)]) for t in range(7)], 1)
    assert torch.equal(z.generative(x, compare), y)
    mean = torch.stack([x[:, : t + 1].mean(1) for t in range(7)], 1)
    assert torch.allclose(z.GenerativeWithContext(compare)(x), (y + mean) / 2, atol=1e-6)
    assert measure.parameters(z.Generative(compare)) == 0


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_generative_function_sees_one_word_per_layer(layers):
    torch.manual_seed(0)
    x, n = torch.randn(8, 9, 16), 9
    stack = Stack([z.Generative() for _ in range(layers)])
    band = causal_mask(n) & ~causal_mask(n).tril(-layers - 1)
    assert contracts.structured(stack, x, band)
    assert not contracts.structured(stack, x, causal_mask(n) & ~causal_mask(n).tril(-layers))
    rolled = lambda x: torch.minimum(x, x.roll(1, 1))  # the first word is compared with the last one
    assert contracts.causal(stack, x) and not contracts.causal(rolled, x)


def test_generative_function_needs_memory_in_proportion():
    sizes = [512, 1024, 2048]
    used = [measure.peak_bytes(z.generative, torch.ones(1, n, 8)) for n in sizes]
    assert measure.growth(sizes, used).exponent < 1.05


# ------------------------------------------------------------------------------------------------------------- rcmha


@sizes
def test_rcmha_shift_equals_looking_up_every_distance(seed, b, h, n, e):
    layer = randomized(z.RelativeAttention(h, e, length=n + 3), 1.0)
    q, k, v = qkv(b, h, n, e)
    distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)

    def gathered(q, k, v, shift=0):
        d = (distance + shift).clamp(min=0, max=n + 2)
        place = torch.einsum("bhne,nmhe->bhnm", q, layer.keys[d]) + layer.bias[d].permute(2, 0, 1)
        scores = ((q + layer.query[:, None]) @ k.transpose(-2, -1) + place) / math.sqrt(e)
        return scores.masked_fill(~causal_mask(n), -torch.inf).softmax(-1) @ v

    assert contracts.reduces_to(layer, gathered, q, k, v)
    assert not contracts.agree(layer, partial(gathered, shift=1), q, k, v, atol=1e-3)  # wrong by one
    last = layer(q[:, :, -2:], k, v)
    assert torch.allclose(last, gathered(q, k, v)[:, :, -2:], atol=1e-5), "queries are the last n of m positions"


@pytest.mark.parametrize("n, m", [(1, 1), (4, 4), (3, 7), (1, 5)])
def test_rcmha_relative_shift(n, m):
    by_distance = torch.arange(float(m)).flip(0).expand(2, 3, n, m)
    found = z.relative_shift(by_distance)
    for i in range(n):
        for j in range(m - n + i + 1):
            assert (found[:, :, i, j] == (m - n + i) - j).all()


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_rcmha_convolution_equals_a_loop(seed, kernel):
    layer, x = z.CausalHeadConvolution(5, kernel), torch.randn(2, 3, 8, 5)
    y = layer.bias.expand_as(x).clone()
    for t in range(8):
        for i in range(kernel):
            if (s := t - (kernel - 1) + i) >= 0:
                y[:, :, t] += layer.weight[:, 0, i] * x[:, :, s]
    assert torch.allclose(layer(x), y, atol=1e-5)


@pytest.mark.parametrize("width, heads", [(16, 2), (24, 3)])
def test_rcmha_with_a_delta_kernel_is_relative_attention(seed, width, heads):
    layer = z.rcmha(width, heads, length=12)
    randomized(layer.attend)
    plain = MultiHeadAttention(width, heads, attend=layer.attend, bias=False)
    plain.load_state_dict({k: p for k, p in layer.state_dict().items() if "convolve" not in k})
    x, e = torch.randn(2, 9, width), width // heads
    assert not contracts.agree(layer, plain, x, atol=1e-3)
    assert measure.parameters(layer) - measure.parameters(plain) == 3 * (3 + 1) * e
    for convolution in layer.convolve:
        nn.init.zeros_(convolution.bias)
        convolution.weight.data.zero_()[..., -1] = 1.0
    assert contracts.agree(layer, plain, x)


def test_rcmha_with_a_centered_convolution_is_caught():
    class Centered(z.CausalHeadConvolution):
        def forward(self, x):
            return super().forward(x.roll(-1, 2))

    layer = z.rcmha(16, 2, length=12)
    assert contracts.causal(layer, torch.randn(2, 8, 16))
    layer.convolve = nn.ModuleList(Centered(8) for _ in range(3))
    assert not contracts.causal(layer, torch.randn(2, 8, 16))


def test_rcmha_writes_with_its_cache(seed):
    model = language_model(13, 16, 2, mixer=lambda: z.rcmha(16, 2, length=20))
    randomized(model, 0.1)
    longer = generate(model, torch.randint(13, (2, 4)), 6)
    for t in range(4, 10):
        assert torch.equal(longer[:, t], model(longer[:, :t])[:, -1].argmax(-1))


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments_name_their_values():
    q, k = torch.randn(1, 6, 3, 4), torch.randn(1, 4, 3, 4)
    for call, words in [
        (lambda: z.grouped_attention(q, k, k), "6 query heads cannot share 4"),
        (lambda: z.GroupedQueryAttention(24, 6, 4), "6 heads cannot share 4"),
        (lambda: z.GroupedQueryAttention(24, 6, 0), "6 heads cannot share 0"),
        (lambda: z.group_heads(MultiHeadAttention(24, 6), 4), "6 heads cannot share 4"),
        (lambda: z.differential_attention(q, q, q, 0.5), r"\[6, 6, 6\]"),
        (lambda: z.lambda_init(0), "got 0"),
        (lambda: z.DifferentialAttention(24, 5), "10 heads"),
        (lambda: z.DifferentialAttention(24, 3, layer=0), "got 0"),
        (lambda: z.SharedDifferentialAttention(24, 3, rank=0), "got 0"),
        (lambda: z.self_gated_attention(q[:, :, :2], q, q), "2 queries do not fit 3 keys"),
        (lambda: z.RandomReference(5, 4)(6), "6 tokens"),
        (lambda: z.TextReference(TokenEmbedding(9, 4), torch.arange(5))(6), "6 tokens"),
        (lambda: z.RelativeAttention(6, 4, length=2)(q, q, q), "3 tokens"),
        (lambda: z.rcmha(16, 3, length=4), "16 .* 3 heads"),
        (lambda: z.taylor_attention(q, q, q, torch.ones(2, 2, dtype=torch.bool)), r"\(2, 2\)"),
        (lambda: z.sink_attention(q, q, q, torch.zeros(6), torch.ones(2, 2, dtype=torch.bool)), r"\(2, 3\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_mechanisms_have_one_size():
    for name, make in z.mechanisms.items():
        module, (x,) = make()
        assert x.shape == (4, 128, 64) and module(x).shape == x.shape, name
    assert next(iter(z.mechanisms)) == "plain attention"


@pytest.mark.parametrize("make", [z.Generative, z.GenerativeWithContext])
def test_generative_in_pieces_and_after_padding(make):
    mixer, x = make(), torch.randn(2, 9, 4)
    with remember(mixer) as past:
        pieces = torch.cat([mixer(piece) for piece in x.split([1, 3, 5], 1)], 1)
        assert past.numbers() <= 2 * (4 + 1 + 4 + 1), "the last token, and sum and count: however long the text"
    torch.testing.assert_close(pieces, mixer(x), atol=1e-6, rtol=1e-5)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :3] = False
    changed = torch.where(real[..., None], x, 7.0)
    for given in (x, changed):  # left padding: as if the text began at its first real token
        torch.testing.assert_close(mixer(given, padding_mask(real))[0, 3:], mixer(x[:1, 3:])[0], atol=1e-6, rtol=1e-5)
    with remember(mixer):  # ... also when it comes in pieces
        parts = [mixer(t, padding_mask(r)) for t, r in zip(changed.split(2, 1), real.split(2, 1), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1)[0, 3:], mixer(x[:1, 3:])[0], atol=1e-6, rtol=1e-5)


def test_running_mean_in_16_bits_counts_beyond_256():
    x = torch.ones(1, 2000, 1, dtype=torch.bfloat16)
    assert (z.running_mean(x) == 1).all()


# ---------------------------------------------------------------------------------------- Llama 3, Llama 2, Mixtral


@pytest.mark.parametrize(
    "make, total",
    [(z.llama3_8b, 8_030_261_248), (z.llama2_70b, 68_976_648_192), (z.mixtral_8x7b, 46_702_792_704)],
)
def test_decoders_with_grouped_keys_have_their_published_sizes(make, total):
    with torch.device("meta"):
        assert measure.parameters(make()) == total


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_rotary_is_rotary_with_copied_keys(groups):
    layer, x = z.grouped_rotary_attention(32, 4, groups, base=300.0), torch.randn(2, 9, 32)
    q, k, v = layer.project(x)
    k, v = (t.repeat_interleave(4 // groups, 1) for t in (k, v))
    plain = Rotary(8, causal_attention, rotary_speeds(8, 300.0))
    expected = layer.to_out(plain(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert layer.to_qkv.bias is None and layer.to_out.bias is None
    with torch.no_grad(), remember(layer) as past:
        pieces = torch.cat([layer(piece) for piece in x.split([4, 1, 4], 1)], 1)
        assert past.numbers() == 2 * 9 * groups * 8 * 2 + 1, "keys and values, and how far the text is"
    torch.testing.assert_close(pieces, layer(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="4 heads cannot share 3"):
        z.grouped_rotary_attention(32, 4, 3)

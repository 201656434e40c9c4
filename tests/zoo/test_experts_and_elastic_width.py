"""Chapter 08: what must hold for experts, nested widths, growing and hashed weights, routed heads and hidden groups."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.train import next_token_loss
from tfkit.zoo.attention import MultiHeadAttention, causal_attention, padding_mask
from tfkit.zoo.experts_and_elastic_width import (
    ExpertBlock,
    Experts,
    GatedExperts,
    MemoryLayer,
    MixtureOfExperts,
    MixtureOfHeads,
    MixtureOfHiddenDimensions,
    NestedFeedForward,
    Pattention,
    Router,
    balance_loss,
    granularities,
    group_gates,
    grow,
    hash_rows,
    hash_weights,
    head_gates,
    memory_feedforward,
    memory_lookup,
    memoryformer,
    mix_experts,
    mixtral,
    nested_feedforward,
    pattention,
    queue_places,
    route,
    routings,
    set_units,
    switch_route,
    token_attention,
    tokenformer,
    z_loss,
)
from tfkit.zoo.feedforward import rotary_attention
from tfkit.zoo.transformer import FeedForward, generate, language_model

SEEDS = (0, 1, 2)


def ask_one_by_one(x, routing, experts, capacity=None):
    """The mixture in plain loops: first choices of all tokens are served first, then second choices, and so on."""
    served, out = [0] * routing.logits.shape[-1], torch.zeros_like(x)
    for choice in range(routing.chosen.shape[1]):
        for t in range(len(x)):
            expert = int(routing.chosen[t, choice])
            if capacity is None or served[expert] < capacity:
                answer = experts(x[t].expand(len(served), 1, -1))[expert, 0]
                out[t] = out[t] + routing.weights[t, choice] * answer
            served[expert] += 1
    return out


# --- routers, experts, losses


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("experts, top_k, capacity", [(4, 2, None), (5, 1, None), (3, 3, None), (4, 2, 3), (2, 2, 1)])
def test_experts_answer_as_in_plain_loops(seed, experts, top_k, capacity):
    torch.manual_seed(seed)
    layer, x = Experts(6, 10, experts), torch.randn(9, 6)
    routing = route(torch.randn(9, experts), top_k)
    at_once = lambda x: mix_experts(x, routing, layer, capacity)
    assert contracts.reduces_to(at_once, lambda x: ask_one_by_one(x, routing, layer, capacity), x)


def test_serving_in_another_order_is_another_mixture():
    torch.manual_seed(0)
    layer, x = Experts(6, 10, 3), torch.randn(9, 6)
    routing = route(torch.randn(9, 3), 2)
    backwards = routing._replace(chosen=routing.chosen.flip(1), weights=routing.weights.flip(1))
    assert not contracts.agree(
        lambda x: mix_experts(x, backwards, layer, 2), lambda x: ask_one_by_one(x, routing, layer, 2), x
    )
    assert contracts.agree(lambda x: mix_experts(x, backwards, layer), lambda x: mix_experts(x, routing, layer), x)


@pytest.mark.parametrize("seed", SEEDS)
def test_places_in_the_queue_are_counted(seed):
    chosen = torch.rand(20, 5, generator=torch.Generator().manual_seed(seed)).topk(3).indices
    places, seen = queue_places(chosen, 5), [0] * 5
    for choice, token in itertools.product(range(3), range(20)):
        assert places[token, choice] == seen[chosen[token, choice]]
        seen[chosen[token, choice]] += 1


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_are_a_softmax_over_the_chosen(seed):
    logits = torch.randn(30, 7, generator=torch.Generator().manual_seed(seed))
    best, chosen = logits.topk(3)
    routing = route(logits, 3)
    assert torch.equal(routing.chosen, chosen)
    assert torch.allclose(routing.weights, best.softmax(-1), atol=1e-6)
    assert torch.allclose(switch_route(logits, 3).weights, logits.softmax(-1).topk(3).values)


def copies(feedforward, count):
    twin = Experts(feedforward.up.in_features, feedforward.up.out_features, count)
    with torch.no_grad():
        twin.up.copy_(feedforward.up.weight), twin.up_bias.copy_(feedforward.up.bias)
        twin.down.copy_(feedforward.down.weight), twin.down_bias.copy_(feedforward.down.bias)
    return twin


@pytest.mark.parametrize("count, top_k", [(1, 1), (5, 1), (5, 3), (5, 5)])
def test_a_mixture_without_a_choice_is_dense(count, top_k):
    dense, x = FeedForward(8, 12), torch.randn(2, 7, 8)
    mixture = MixtureOfExperts(Router(8, count, top_k), copies(dense, count))
    assert contracts.reduces_to(mixture, dense, x)
    unscaled = MixtureOfExperts(Router(8, count, top_k, switch_route), copies(dense, count))
    assert bool(contracts.agree(unscaled, dense, x)) == (top_k == count)


def test_all_experts_are_the_soft_mixture():
    layer, x = MixtureOfExperts(Router(8, 4, 4), Experts(8, 12, 4)), torch.randn(11, 8)
    soft = lambda x: torch.einsum("te,etd->td", layer.router.score(x).softmax(-1), layer.experts(x.expand(4, -1, -1)))
    assert contracts.reduces_to(layer, soft, x)


def test_one_expert_with_scaled_weights_teaches_the_router_nothing():
    x = torch.randn(10, 8)
    for choose, learns in ((route, False), (switch_route, True)):
        router = Router(8, 4, 1, choose)
        router(x).weights.square().sum().backward()
        assert bool(router.score.weight.grad.abs().max() > 1e-6) == learns


def test_tokens_are_alone_without_a_capacity_and_see_the_future_with_one():
    x = torch.randn(1, 16, 8)
    experts = Experts(8, 12, 4)
    assert contracts.local(MixtureOfExperts(Router(8, 4, 2), experts), x, window=0)
    for seed in SEEDS:
        torch.manual_seed(seed)
        limited = MixtureOfExperts(Router(8, 4, 2), experts, 0.5)
        assert not contracts.causal(lambda x, layer=limited: x + layer(x), x)
    everybody = MixtureOfExperts(Router(8, 4, 2), experts, capacity_factor=4.0)
    unlimited = MixtureOfExperts(everybody.router, experts)
    assert contracts.agree(everybody, unlimited, x)


def test_dropped_tokens_get_nothing():
    layer = MixtureOfExperts(Router(8, 2, 1), Experts(8, 12, 2), capacity_factor=0.5)
    y = layer(torch.randn(1, 8, 8).expand(1, 8, 8).clone()[:, :1].expand(1, 8, 8))  # eight equal tokens, one queue
    assert y[0, :2].abs().min() > 0 and not y[0, 2:].any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("capacity", [None, 0.4])
def test_padded_tokens_take_no_part(seed, capacity):
    """Real tokens come out as if the padding were not there; padding comes out as zero, and no routing speaks of it."""
    torch.manual_seed(seed)
    layer = MixtureOfExperts(Router(16, 4, 2), Experts(16, 8, 4), capacity)
    x, real = torch.randn(3, 7, 16), torch.rand(3, 7) < 0.6
    real[0], real[1, 0], real[2] = True, True, False
    with routings(layer) as seen:
        y = layer(x, real)
    torch.testing.assert_close(y[real], layer(x[real]), atol=1e-6, rtol=1e-5)
    assert not y[~real].any() and seen[0].chosen.shape == (int(real.sum()), 2)
    everything = layer(x, torch.ones(3, 7, dtype=torch.bool))
    torch.testing.assert_close(everything, layer(x), atol=1e-6, rtol=1e-5)
    assert not layer(x, torch.zeros(3, 7, dtype=torch.bool)).any()
    with pytest.raises(ValueError, match=r"real is \(3, 7\), got \(3, 6\)"):
        layer(x, real[:, 1:])


@pytest.mark.parametrize("seed", SEEDS)
def test_expert_block_hands_the_padding_mask_on(seed):
    torch.manual_seed(seed)
    feed = MixtureOfExperts(Router(16, 4, 2), Experts(16, 8, 4), 0.5)
    block = ExpertBlock(MultiHeadAttention(16, 2), feed, lambda: nn.LayerNorm(16))
    x, real = torch.randn(2, 6, 16), torch.arange(6) < torch.tensor([[6], [3]])
    other = torch.where(real[..., None], x, torch.randn(2, 6, 16))
    assert torch.equal(block(x, mask=padding_mask(real))[real], block(other, mask=padding_mask(real))[real])
    assert not torch.allclose(block(x)[real], block(other)[real])
    plain = block.feed(block.mix(x))
    assert torch.equal(block(x), plain)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", SEEDS)
def test_router_scores_in_float32(seed, narrow):
    torch.manual_seed(seed)
    router, x = Router(16, 6, 2).to(narrow), torch.randn(40, 16).to(narrow)
    routing = router(x)
    assert routing.logits.dtype == torch.float32 and routing.weights.dtype == narrow
    expected = x.float() @ router.score.weight.float().T
    torch.testing.assert_close(routing.logits, expected, atol=1e-5, rtol=1e-5)
    wide, y = Router(16, 6, 2), torch.randn(40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = wide(y).logits
    torch.testing.assert_close(inside, wide(y).logits, atol=1e-6, rtol=1e-6)
    double = Router(16, 6, 2).double()
    assert double(y.double()).logits.dtype == torch.float64


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["experts", "heads", "groups"])
def test_routed_layers_run_in_16_bits(kind, narrow):
    make = {
        "experts": lambda: MixtureOfExperts(Router(16, 4, 2), GatedExperts(16, 8, 4)),
        "heads": lambda: MixtureOfHeads(16, 4, shared=2, top_k=1),
        "groups": lambda: MixtureOfHiddenDimensions(16, 24, 6, active=3, shared=1),
    }
    layer, x = make[kind](), torch.randn(2, 5, 16).to(narrow)
    layer = layer.to(narrow)
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == narrow
    with torch.no_grad():  # the same numbers in float32: choices agree, since scores are float32 in both
        torch.testing.assert_close(out.float(), layer.float()(x.float()), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_router_jitter_is_noise_of_training_alone(seed):
    torch.manual_seed(seed)
    router, x = Router(16, 4, 1, jitter=0.25), torch.randn(200, 16)
    plain = x @ router.score.weight.T
    torch.testing.assert_close(router.eval()(x).logits, plain, atol=1e-6, rtol=1e-6)
    one = Router(1, 2, 1, jitter=0.25).train()  # one number for each token: the factor is the ratio of the logits
    y = torch.rand(5000, 1) + 1
    factor = (one(y).logits / (y @ one.score.weight.T))[:, 0]
    assert factor.min() >= 0.75 - 1e-5 and factor.max() <= 1.25 + 1e-5
    assert factor.min() < 0.76 and factor.max() > 1.24 and abs(factor.mean().item() - 1) < 0.01
    assert abs(factor.std().item() - 0.25 / 3**0.5) < 0.01
    many = router.train()(x).logits - plain  # every feature has noise of its own, so columns do not move together
    assert torch.corrcoef(many.T).triu(1).abs().max() < 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_mixtral_starts_as_published_and_is_causal(seed):
    torch.manual_seed(seed)
    model = mixtral(300, 64, 2, 96, 4, mixer=lambda: rotary_attention(64, 2), eps=0.25)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            assert abs(weight.std().item() / 0.02 - 1) < 5 / (2 * weight.numel()) ** 0.5, name
    assert {m.eps for m in model.modules() if isinstance(m, nn.RMSNorm)} == {0.25}
    ids = torch.randint(300, (4, 33))
    assert abs(next_token_loss(model(ids[:, :-1]), ids[:, 1:]).item() - math.log(300)) < 0.05
    assert contracts.causal(model, ids[:1, :12])
    with torch.device("meta"):
        default = mixtral(depth=1)
    assert default.stack.blocks[0].mix.part.heads == 32
    speeds = default.stack.blocks[0].mix.part.attend.speeds
    assert speeds.shape == (64,)


@pytest.mark.parametrize("bits, extra", [(4, 2), (2, 1)])
@pytest.mark.parametrize("seed", SEEDS)
def test_memory_feedforward_normalizes_between_its_lookups(seed, bits, extra):
    torch.manual_seed(seed)
    layer, x = memory_feedforward(8, bits, extra), torch.randn(5, 8)
    first, norm, last = layer
    assert last.tables.shape[1] == 2 ** (bits + extra) and len(last.tables) == 8 // bits
    with torch.no_grad():
        norm.weight.add_(torch.randn_like(norm.weight)), norm.bias.add_(torch.randn_like(norm.bias))
    hidden = first(x)
    centered = hidden - hidden.mean(-1, keepdim=True)
    middle = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(layer(x), last(middle), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_memoryformer_writes_its_heads_as_they_are(seed):
    """One lookup makes q, k and v, and no map stands behind attention."""
    torch.manual_seed(seed)
    mixer, x = memoryformer(20, 16, 1, heads=2, bits=4).stack.blocks[0].mix.part, torch.randn(2, 6, 16)
    q, k, v = mixer.to_qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_balance_and_z_loss_follow_their_formulas(seed):
    torch.manual_seed(seed)
    logits = torch.randn(2, 9, 5)
    chosen = route(logits, 2).chosen
    share = [(chosen == i).sum().item() / 36 for i in range(5)]
    mean = logits.softmax(-1).mean((0, 1)).tolist()
    assert math.isclose(balance_loss(logits, chosen), 5 * sum(map(lambda f, p: f * p, share, mean)), rel_tol=1e-5)
    assert math.isclose(z_loss(logits), logits.exp().sum(-1).log().square().mean(), rel_tol=1e-5)
    turns = torch.arange(20).view(10, 2) % 5
    assert math.isclose(balance_loss(torch.zeros(10, 5), turns), 1.0, rel_tol=1e-6)
    crowded = torch.tensor([[50.0, 0, 0, 0, 0]]).expand(10, 5)
    assert math.isclose(balance_loss(crowded, route(crowded, 1).chosen), 5.0, rel_tol=1e-5)


def test_routings_listens_only_inside_its_context():
    layer = lambda: MixtureOfExperts(Router(16, 4, 2), Experts(16, 8, 4))
    model, ids = language_model(20, 16, 2, feedforward=layer), torch.randint(20, (2, 5))
    with routings(model) as seen:
        model(ids)
    model(ids)
    assert len(seen) == 2 and seen[0].chosen.shape == (10, 2)
    assert not any(m._forward_hooks for m in model.modules())
    assert contracts.causal(model, ids)


@pytest.mark.parametrize("seed", SEEDS)
def test_parity_with_mixtral(seed):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    torch.manual_seed(seed)
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2)
    theirs = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    ours = MixtureOfExperts(Router(16, 6, 2), GatedExperts(16, 24, 6))
    names = {"gate.weight": "router.score.weight"}
    names |= {"experts.gate_up_proj": "experts.gate_up", "experts.down_proj": "experts.down"}
    contracts.copy_weights(theirs, ours, names)
    x = torch.randn(2, 9, 16)
    assert contracts.agree(ours, theirs, x, atol=1e-5)
    logits, chosen, _ = ours.router(x.flatten(0, 1))
    expected = load_balancing_loss_func((logits,), num_experts=6, top_k=2)  # their shares sum to top_k
    assert torch.allclose(2 * balance_loss(logits, chosen), expected, atol=1e-5)
    swapped = MixtureOfExperts(Router(16, 6, 2, switch_route), ours.experts)
    swapped.router.load_state_dict(ours.router.state_dict())
    assert not contracts.agree(swapped, theirs, x, atol=1e-3)


# --- matformer


def exact(layer):
    """Weights that are small multiples of an eighth, with which float arithmetic does not round."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_((8 * torch.randn(p.shape)).round() / 8)
    return layer


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("units", [1, 5, 16, 40])
def test_matformer_extracts_what_it_slices(seed, bias, units):
    torch.manual_seed(seed)
    layer, x = exact(NestedFeedForward(6, 40, nn.ReLU, bias)), torch.randint(-4, 5, (2, 3, 6)).float()
    layer.units = units
    small = layer.extract()
    assert type(small) is FeedForward and small.up.out_features == units
    assert torch.equal(small(x), layer(x))
    by_hand = (x @ layer.up.weight[:units].T + (layer.up.bias[:units] if bias else 0)).relu()
    assert torch.equal(by_hand @ layer.down.weight[:, :units].T + (layer.down.bias if bias else 0), layer(x))
    if units < 40:
        last = (x @ layer.up.weight[-units:].T + (layer.up.bias[-units:] if bias else 0)).relu()
        assert not torch.equal(last @ layer.down.weight[:, -units:].T + (layer.down.bias if bias else 0), layer(x))


def test_matformer_full_width_is_the_feedforward_and_the_copy_is_independent():
    layer, plain, x = NestedFeedForward(8, 16), FeedForward(8, 16), torch.randn(3, 8)
    plain.load_state_dict(layer.state_dict())
    assert contracts.reduces_to(layer, plain, x)
    small, before = layer.extract(), layer(x)
    with torch.no_grad():
        small.up.weight.add_(1.0)
    assert torch.equal(layer(x), before)


def test_matformer_units_per_layer():
    model = language_model(20, 16, 3, feedforward=lambda: NestedFeedForward(16, 32))
    set_units(model, [4, 8, 32])
    assert [m.units for m in model.modules() if isinstance(m, NestedFeedForward)] == [4, 8, 32]
    ids = torch.randint(20, (2, 6))
    cut = copy.deepcopy(model)
    for block in cut.stack.blocks:
        block.feed.part = block.feed.part.extract()
    assert contracts.agree(cut, model, ids) and contracts.causal(model, ids)
    before = model(ids)
    set_units(model, 8)
    assert not torch.allclose(model(ids), before, atol=1e-4)
    assert granularities(64) == [8, 16, 32, 64] and granularities(6, 2) == [3, 6]


# --- tokenformer


@pytest.mark.parametrize("seed", SEEDS)
def test_tokenformer_attends_to_its_pairs(seed):
    torch.manual_seed(seed)
    x, keys, values = torch.randn(2, 4, 6), torch.randn(9, 6), torch.randn(9, 5)
    out = torch.zeros(2, 4, 5)
    for b, n in itertools.product(range(2), range(4)):
        scores = [float(x[b, n] @ key) for key in keys]
        length = math.sqrt(sum(a * a for a in scores))
        for a, value in zip(scores, values, strict=True):
            z = 3.0 * a / length
            out[b, n] += 0.5 * z * (1 + math.erf(z / math.sqrt(2))) * value
    assert torch.allclose(pattention(x, keys, values, 3.0), out, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("times", [1, 2, 5])
def test_tokenformer_grows_without_changing(seed, times):
    torch.manual_seed(seed)
    model, ids = tokenformer(20, 16, 2, heads=2, pairs=6).double(), torch.randint(20, (2, 7))
    before = model(ids)
    size = measure.parameters(model)
    grow(model, times)
    assert torch.allclose(model(ids), before, atol=1e-12)
    assert measure.parameters(model) - size == (times - 1) * (size - 20 * 16)
    assert contracts.causal(model, ids)


@pytest.mark.parametrize("fault", ["scale", "keys"])
def test_tokenformer_growth_needs_the_old_scale_and_zero_keys(fault):
    layer, x = Pattention(8, 5, pairs=6), torch.randn(4, 8)
    before = layer(x)
    layer.grow(6)
    assert torch.allclose(layer(x), before, atol=1e-6)
    with torch.no_grad():
        if fault == "scale":
            layer.scale.copy_(torch.tensor(12.0).sqrt())
        else:
            layer.keys[6:].normal_()
    assert not torch.allclose(layer(x), before, atol=1e-2)


def test_tokenformer_new_pairs_can_learn_and_are_saved():
    layer = Pattention(8, 5, pairs=6)
    layer.grow(3)
    layer(torch.randn(4, 8)).square().sum().backward()
    assert layer.keys.grad[6:].abs().min(-1).values.max() > 0 and not layer.values.grad[6:].any()
    other = Pattention(8, 5, pairs=9)
    other.load_state_dict(layer.state_dict())
    assert contracts.agree(other, layer, torch.randn(4, 8))


def test_tokenformer_attention_remembers():
    model, ids = tokenformer(20, 16, 1, heads=2, pairs=6), torch.randint(20, (1, 4))
    slow = ids
    for _ in range(3):
        slow = torch.cat([slow, model(slow)[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(generate(model, ids, 3), slow)
    assert contracts.permutation_equivariant(token_attention(16, 2, 6), torch.randn(1, 5, 16))


# --- memoryformer


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_memoryformer_weight_is_the_share_of_the_nearest_corner(seed, bits):
    z = torch.randn(12, bits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)), dtype=torch.float64)
    share = (z @ corners.T).softmax(-1)
    assert torch.allclose(hash_weights(z), share.amax(-1), atol=1e-12)
    nearest = corners[share.argmax(-1)]
    assert torch.equal(hash_rows(z), ((nearest > 0) * 2 ** torch.arange(bits)).sum(-1))
    assert not torch.allclose(torch.sigmoid(z.abs()).prod(-1), share.amax(-1), atol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_memoryformer_lookup_equals_a_loop(seed, shape):
    torch.manual_seed(seed)
    x, tables = torch.randn(shape), torch.randn(2, 8, 4)

    def by_loop(x):
        out = []
        for token in x.reshape(-1, 6):
            pieces = token.split(3)
            rows = [sum(2**i for i in range(3) if piece[i] >= 0) for piece in pieces]
            share = [torch.stack([1 / (1 + torch.exp(-2 * v.abs())) for v in piece]).prod() for piece in pieces]
            out.append(share[0] * tables[0, rows[0]] + share[1] * tables[1, rows[1]])
        return torch.stack(out).view(*x.shape[:-1], 4)

    assert contracts.reduces_to(lambda x: memory_lookup(x, tables), by_loop, x)
    flipped = tables.flip(1)
    assert not contracts.agree(lambda x: memory_lookup(x, flipped), by_loop, x)


def test_memoryformer_collisions_follow_the_angle():
    generator = torch.Generator().manual_seed(0)
    for bits, cosine in itertools.product((2, 5), (-0.5, 0.0, 0.7)):
        a, noise = torch.randn(2, 40_000, bits, generator=generator)
        b = cosine * a + math.sqrt(1 - cosine**2) * noise
        rate = (hash_rows(a) == hash_rows(b)).double().mean().item()
        assert abs(rate - (1 - math.acos(cosine) / math.pi) ** bits) < 0.01


def test_memoryformer_counts_and_causality():
    layer, x = MemoryLayer(24, 7, bits=4), torch.randn(5, 24)
    assert measure.parameters(layer) == 6 * 16 * 7 + 7 and measure.flops(layer, x) == 0
    feed = memory_feedforward(24, bits=4)
    assert feed[0].tables.shape == (6, 16, 36) and feed[2].tables.shape == (6, 64, 24)
    assert contracts.gradients_reach(nn.Sequential(nn.Linear(24, 24), feed), x)
    ids = torch.randint(20, (2, 6))
    assert contracts.causal(memoryformer(20, 16, 2, heads=2, bits=4), ids)


# --- moh


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("heads, shared", [(4, 1), (4, 2), (8, 3)])
def test_moh_with_all_heads_and_equal_scores_is_multihead_attention(seed, heads, shared):
    torch.manual_seed(seed)
    plain, x = MultiHeadAttention(16, heads), torch.randn(2, 5, 16)
    layer = MixtureOfHeads(16, heads, shared, heads - shared)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert not contracts.agree(layer, plain, x, atol=1e-3)
    with torch.no_grad():
        layer.router.score.weight.zero_(), layer.shared.weight.zero_(), layer.share.weight.zero_()
    assert contracts.reduces_to(layer, plain, x)
    mask = torch.rand(5, 5) > 0.5
    assert torch.allclose(layer(x, mask), plain(x, mask), atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_moh_gates_follow_their_formula(seed):
    torch.manual_seed(seed)
    layer, x = MixtureOfHeads(16, 8, shared=3, top_k=2), torch.randn(2, 5, 16)
    gates = layer.gates(x)
    assert ((gates != 0).sum(-1) == 5).all()
    a = 2 * (x @ layer.share.weight.T).softmax(-1)
    assert torch.allclose(gates[..., :3], 3 * a[..., :1] * (x @ layer.shared.weight.T).softmax(-1), atol=1e-5)
    p = (x @ layer.router.score.weight.T).softmax(-1)
    kept = torch.where(p >= p.topk(2).values[..., -1:], p, 0.0)
    assert torch.allclose(gates[..., 3:], 2 * a[..., 1:] * kept / kept.sum(-1, keepdim=True), atol=1e-5)
    assert measure.parameters(layer) - measure.parameters(MultiHeadAttention(16, 8)) == 16 * (8 + 2)
    assert contracts.causal(MixtureOfHeads(16, 4, 2, 1, causal_attention), x)
    unscaled = head_gates(layer.shared(x), layer.router(x)._replace(weights=torch.ones(2, 5, 2)), layer.share(x))
    assert not torch.allclose(unscaled, gates, atol=1e-3)


# --- mohd


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("groups, active, shared", [(4, 2, 1), (6, 4, 0), (6, 6, 3), (3, 1, 0)])
def test_mohd_equals_all_groups_masked(seed, groups, active, shared):
    torch.manual_seed(seed)
    layer, x = MixtureOfHiddenDimensions(8, 12, groups, active, shared), torch.randn(2, 5, 8)
    with torch.no_grad():
        layer.fuse.add_(0.3 * torch.randn_like(layer.fuse))

    def masked(x):
        logits = layer.router.score(x)
        if shared:
            logits = torch.cat([layer.always(x), logits], -1)
        on = torch.ones_like(logits, dtype=torch.bool)
        threshold = logits[..., shared:].topk(active - shared).values[..., -1:]
        on[..., shared:] = logits[..., shared:] >= threshold
        g = torch.where(on, logits.softmax(-1), 0.0)
        alpha = groups * g.sum(-1, keepdim=True)
        h = layer.up(x).unflatten(-1, (groups, -1)) * (alpha * g).unsqueeze(-1)
        h = F.gelu(torch.einsum("bngs,grs->bngr", h, layer.fuse)) * on.unsqueeze(-1)
        return layer.down(h.flatten(2))

    assert contracts.reduces_to(layer, masked, x)
    assert contracts.local(layer, x, window=0)


@pytest.mark.parametrize("shared", [0, 2])
def test_mohd_with_all_groups_and_equal_gates_is_dense(shared):
    plain, x = FeedForward(8, 12), torch.randn(2, 5, 8)
    layer = MixtureOfHiddenDimensions(8, 12, groups=6, active=6, shared=shared)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert not contracts.agree(layer, plain, x, atol=1e-3)
    with torch.no_grad():
        layer.router.score.weight.zero_()
        if shared:
            layer.always.weight.zero_()
    assert torch.allclose(layer.route(x)[1], torch.ones(2, 5, 6), atol=1e-6)
    assert contracts.reduces_to(layer, plain, x)
    with torch.no_grad():
        layer.fuse.mul_(1.1)
    assert not contracts.agree(layer, plain, x, atol=1e-4)


def test_mohd_gates_and_work():
    gates = group_gates(torch.zeros(5, 2), route(torch.zeros(5, 6), 1))
    assert torch.allclose(gates[:, :2], torch.full((5, 2), 3 / 8)) and ((gates != 0).sum(-1) == 3).all()
    layer = MixtureOfHiddenDimensions(8, 24, groups=6, active=2, shared=1)
    with torch.no_grad():
        layer.router.score.weight.copy_(torch.eye(5, 8))
    x = F.pad(torch.eye(5).repeat(4, 1), (0, 3))  # 20 tokens, four for each specialized group
    dense = measure.flops(FeedForward(8, 24), x)
    assert measure.flops(layer, x) == dense * 2 // 6 + 2 * 20 * 8 * 6 + 2 * 20 * 2 * 4 * 4


# --- bad arguments

BAD = {
    "top_k of 0": lambda: route(torch.zeros(3, 4), 0),
    "top_k above the experts": lambda: Router(8, 4, 5),
    "jitter of 1": lambda: Router(8, 4, 2, jitter=1.0),
    "jitter below 0": lambda: Router(8, 4, 2, jitter=-0.1),
    "capacity factor 0": lambda: MixtureOfExperts(Router(8, 4, 2), Experts(8, 8, 4), 0.0),
    "matformer: more units than there are": lambda: nested_feedforward(torch.zeros(1, 8), FeedForward(8, 16), 17),
    "matformer: no units": lambda: nested_feedforward(torch.zeros(1, 8), FeedForward(8, 16), 0),
    "matformer: widths that are not whole": lambda: granularities(12, 4),
    "matformer: wrong number of layers": lambda: set_units(NestedFeedForward(8, 16), [4, 8]),
    "tokenformer: no pairs": lambda: Pattention(8, 8, 0),
    "tokenformer: shrinking": lambda: grow(Pattention(8, 8, 2), 0),
    "memoryformer: pieces that do not fit": lambda: MemoryLayer(10, 8, 4),
    "memoryformer: tables that do not fit": lambda: memory_lookup(torch.zeros(1, 8), torch.zeros(2, 8, 3)),
    "memoryformer: rows that are no power of two": lambda: memory_lookup(torch.zeros(1, 6), torch.zeros(2, 7, 3)),
    "moh: all heads shared": lambda: MixtureOfHeads(16, 4, 4, 1),
    "moh: too many chosen": lambda: MixtureOfHeads(16, 4, 2, 3),
    "mohd: groups that do not divide": lambda: MixtureOfHiddenDimensions(8, 12, 5, 2, 1),
    "mohd: no specialized group active": lambda: MixtureOfHiddenDimensions(8, 12, 4, 2, 2),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_with_their_values(name):
    with pytest.raises(ValueError, match=r"\d"):
        BAD[name]()

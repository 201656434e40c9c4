"""Identities of chapter 06 on random shapes and seeds, parity, and broken variants that must be found."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts
from tfkit.zoo.attention import (
    CrossAttention,
    MultiHeadAttention,
    attention,
    causal_attention,
    causal_mask,
    merge_heads,
)
from tfkit.zoo.depth_and_residuals import (
    AugmentedShortcut,
    BranchNorm,
    ClassBlock,
    DeepCrossStack,
    DeepNorm,
    DenseStack,
    EnsembleScale,
    LayerNormScaling,
    LayerScale,
    Moments,
    NoShortcut,
    PatchEmbedding,
    ResidualMLP,
    SharedValue,
    SkipLayerAttention,
    TalkingHeads,
    ValueResidual,
    Weighted,
    WeightedPost,
    block_circulant,
    cait,
    cait_m36,
    cait_s24,
    cait_s36,
    cait_xxs24,
    deep_stack,
    deepnorm_constants,
    deepnorm_stack,
    deepnorm_translator_constants,
    deepscale_constants,
    deepscale_stack,
    depth_average,
    diversity,
    dropout_moments,
    generalized_residual,
    layer_scale_start,
    layernorm_scaling,
    linear_moments,
    path_outputs,
    relu_moments,
    resformer_stack,
    set_branch_scale,
    signal,
    skip_layer_stack,
    window_sources,
    xavier_,
)
from tfkit.zoo.sparse_attention import CausalWindow
from tfkit.zoo.transformer import (
    Block,
    FeedForward,
    LanguageModel,
    PostNorm,
    PreNorm,
    SinusoidalPositions,
    Stack,
    TokenEmbedding,
    remember,
)

SHAPES = [(1, 3, 8), (2, 7, 16), (3, 5, 24)]
seeds = pytest.mark.parametrize("seed", range(3))
shapes = pytest.mark.parametrize("b, n, d", SHAPES)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disturb(module, seed, size=0.3):
    """Move every parameter off its initial value, so that no identity holds by a special start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return module


# --- instruments


@shapes
def test_diversity_is_the_distance_to_the_nearest_collapsed_state(b, n, d):
    x = draw(0, b, n, d)
    found = diversity(x) * x.norm(dim=(1, 2))
    for seed in range(5):
        other = x.mean(1, keepdim=True) + 0.1 * draw(seed, b, 1, d)
        assert (found <= (x - other).norm(dim=(1, 2)) + 1e-6).all()
    assert diversity(x.mean(1, keepdim=True).expand_as(x)).max() < 1e-6
    assert torch.allclose(diversity(3 * x), diversity(x))


def test_signal_listens_behind_every_block():
    stack, x = deep_stack(3, 8), draw(0, 2, 4, 8)
    heard = signal(stack, x)
    assert [len(v) for v in heard] == [4, 4, 4]
    with torch.no_grad():
        y = stack.blocks[0](x)
    assert torch.isclose(heard.variance[1], y.var()) and torch.isclose(heard.diversity[1], diversity(y).mean())
    y = stack(x.requires_grad_())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.isclose(heard.gradient[0], x.grad.norm())
    assert not any(block._forward_hooks for block in stack.blocks)


@seeds
def test_xavier_gains_reach_values_outputs_and_feedforwards_alone(seed):
    torch.manual_seed(seed)
    stack = xavier_(deep_stack(2, 64), gain=0.25)
    look, feed = stack.blocks[0].mix.part, stack.blocks[0].feed.part
    for weight, gain in zip(
        (*look.to_qkv.weight.chunk(3), look.to_out.weight, feed.up.weight), (1, 1, 0.25, 0.25, 0.25), strict=True
    ):
        expected = gain * math.sqrt(2 / sum(weight.shape))
        assert abs(weight.std().item() / expected - 1) < 0.08
    with_bias = xavier_(MultiHeadAttention(8, 2))
    assert not with_bias.to_qkv.bias.any()


def test_deep_stack_takes_one_wiring_for_each_block():
    stack = deep_stack(2, 8, [PreNorm, PostNorm])
    assert [type(block.mix) for block in stack.blocks] == [PreNorm, PostNorm]
    with pytest.raises(ValueError, match="2 wirings for 3 blocks"):
        deep_stack(3, 8, [PreNorm, PostNorm])


@seeds
def test_weights_on_road_and_branch(seed):
    part, norm, x = FeedForward(8), nn.LayerNorm(8), draw(seed, 2, 3, 8)
    assert torch.allclose(Weighted(part, norm, 0.7, 0.2)(x), 0.7 * x + 0.2 * part(norm(x)))
    assert torch.allclose(WeightedPost(part, norm, 0.7, 0.2)(x), norm(0.7 * x + 0.2 * part(x)))
    assert torch.equal(NoShortcut(part, norm)(x), part(norm(x)))


# --- cait


@pytest.mark.parametrize(
    "make, total", [(cait_xxs24, 11_956_264), (cait_s24, 46_916_200), (cait_s36, 68_366_632), (cait_m36, 271_221_352)]
)
def test_cait_totals(make, total):
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == total


def test_cait_totals_agree_with_a_count_by_hand():
    def by_hand(size, d, depth, h, classes=1000, patch=16):
        attention = 4 * d * d + 4 * d
        rest = (8 * d * d + 5 * d) + 4 * d + 2 * d  # feed-forward, two norms, two scales
        block, class_block = attention + 2 * (h * h + h) + rest, attention + rest
        embed = 3 * patch**2 * d + d + (size // patch) ** 2 * d + d
        return embed + depth * block + 2 * class_block + 2 * d + d * classes + classes

    with torch.device("meta"):
        for size, d, depth, h in ((224, 192, 24, 4), (384, 384, 36, 8), (448, 768, 48, 16)):
            model = cait(size, d, depth, h)
            assert sum(p.numel() for p in model.parameters()) == by_hand(size, d, depth, h)
    assert by_hand(448, 768, 48, 16) == 356_460_520  # CaiT-M-48


@pytest.mark.parametrize("depth, start", [(12, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6), (48, 1e-6)])
def test_cait_layer_scale_start(depth, start):
    assert layer_scale_start(depth) == start


@shapes
def test_cait_layer_scale(b, n, d):
    x, part, norm = draw(1, b, n, d), FeedForward(d), nn.LayerNorm(d)
    layer = LayerScale(part, norm, d, 0.3)
    with torch.no_grad():
        layer.scale.copy_(draw(2, d))
    assert torch.allclose(layer(x), x + layer.scale * part(norm(x)))
    assert torch.equal(LayerScale(part, norm, d, 0.0)(x), x)
    assert contracts.reduces_to(LayerScale(part, norm, d, 1.0), PreNorm(part, norm), x)


def test_cait_layer_scale_is_that_of_dinov2():
    transformers = pytest.importorskip("transformers")
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

    config = transformers.Dinov2Config(
        hidden_size=16, num_attention_heads=4, mlp_ratio=2, layerscale_value=0.3, attn_implementation="eager"
    )
    theirs = disturb(Dinov2Layer(config), 0, 0.1).eval()
    ours = Block(
        MultiHeadAttention(16, 4),
        FeedForward(16, 32),
        partial(nn.LayerNorm, 16, eps=config.layer_norm_eps),
        partial(LayerScale, width=16, start=0.3),
    )
    state = theirs.state_dict()
    pick = lambda *ends: next(v for k, v in state.items() if k.endswith(ends))
    query, key, value = (f"{name}.weight" for name in ("query", "key", "value"))
    if not any(k.endswith(query) for k in state):
        query, key, value = "q_proj.weight", "k_proj.weight", "v_proj.weight"
    bias = lambda name: name.replace("weight", "bias")
    with torch.no_grad():
        look, feed = ours.mix, ours.feed
        look.part.to_qkv.weight.copy_(torch.cat([pick(query), pick(key), pick(value)]))
        look.part.to_qkv.bias.copy_(torch.cat([pick(bias(query)), pick(bias(key)), pick(bias(value))]))
        out = "output.dense.weight" if any(k.endswith("output.dense.weight") for k in state) else "o_proj.weight"
        look.part.to_out.weight.copy_(pick(out)), look.part.to_out.bias.copy_(pick(bias(out)))
        feed.part.up.weight.copy_(pick("fc1.weight")), feed.part.up.bias.copy_(pick("fc1.bias"))
        feed.part.down.weight.copy_(pick("fc2.weight")), feed.part.down.bias.copy_(pick("fc2.bias"))
        for norm, name in ((look.norm, "norm1"), (feed.norm, "norm2")):
            norm.weight.copy_(state[f"{name}.weight"]), norm.bias.copy_(state[f"{name}.bias"])
        look.scale.copy_(pick("layer_scale1.lambda1")), feed.scale.copy_(pick("layer_scale2.lambda1"))
    x = draw(3, 2, 5, 16)
    with torch.no_grad():
        answer = theirs(x)
    answer = answer[0] if isinstance(answer, tuple) else answer
    assert torch.allclose(ours(x), answer, atol=1e-5)


@seeds
def test_cait_talking_heads_written_out(seed):
    heads = disturb(TalkingHeads(3), seed)
    q, k, v = draw(seed, 3, 2, 3, 5, 4).unbind(0)
    scores = torch.stack([q[:, h] @ k[:, h].mT / 2 for h in range(3)], 1)
    mixed = sum(heads.before.weight[:, h].view(1, 3, 1, 1) * scores[:, h : h + 1] for h in range(3))
    weights = (mixed + heads.before.bias.view(1, 3, 1, 1)).softmax(-1)
    mixed = sum(heads.after.weight[:, h].view(1, 3, 1, 1) * weights[:, h : h + 1] for h in range(3))
    expected = (mixed + heads.after.bias.view(1, 3, 1, 1)) @ v
    assert torch.allclose(heads(q, k, v), expected, atol=1e-5)


def test_cait_talking_heads_keep_the_mask_and_one_that_forgets_it_is_found():
    layer = disturb(MultiHeadAttention(8, 2, attend=TalkingHeads(2)), 0)
    x = draw(0, 1, 5, 8)
    assert contracts.causal(lambda x: layer(x, mask=causal_mask(5)[None, None]), x)

    class Forgetful(TalkingHeads):  # masks before the softmax alone: the bias of the second mix leaks
        def forward(self, q, k, v, mask=None):
            scores = self.before((q @ k.mT * q.shape[-1] ** -0.5).movedim(1, -1)).movedim(-1, 1)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            return self.after(weights.movedim(1, -1)).movedim(-1, 1) @ v

    leaky = disturb(MultiHeadAttention(8, 2, attend=Forgetful(2)), 0)
    assert not contracts.causal(lambda x: leaky(x, mask=causal_mask(5)[None, None]), x)


@shapes
def test_cait_class_attention_written_out(b, n, d):
    block = disturb(
        ClassBlock(CrossAttention(d, 2), FeedForward(d), partial(nn.LayerNorm, d), d, 0.5), 0, size=0.2
    ).double()
    token, patches = draw(1, b, 1, d).double(), draw(2, b, n, d).double()
    both = block.norm(torch.cat([token, patches], 1))
    q = block.look.to_q(both[:, :1]).view(b, 2, d // 2)
    k, v = (t.view(b, n + 1, 2, d // 2) for t in block.look.to_kv(both).chunk(2, -1))
    weights = (torch.einsum("bhe,bmhe->bhm", q, k) / math.sqrt(d // 2)).softmax(-1)
    looked = block.look.to_out(torch.einsum("bhm,bmhe->bhe", weights, v).reshape(b, 1, d))
    middle = token + block.scale * looked
    expected = middle + block.feed.scale * block.feed.part(block.feed.norm(middle))
    assert torch.allclose(block(token, patches), expected)


class Pixels(nn.Module):
    """Each pixel a token, without positions."""

    def forward(self, images):
        return images.flatten(2).mT


def test_cait_knows_the_order_of_patches_by_their_places_alone():
    model = disturb(cait(8, 8, 2, 2, classes=3, patch=2, channels=1), 0, 0.1)
    model.embed = Pixels()
    images, order = draw(0, 2, 8, 4, 4), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = images.flatten(2)[..., order].unflatten(2, (4, 4))
    assert torch.allclose(model(images), model(shuffled), atol=1e-5)
    assert not torch.allclose(model(images), model(images.flip(1)), atol=1e-3)


def test_cait_rejects_images_that_do_not_fit():
    with pytest.raises(ValueError, match="5 pixels"):
        PatchEmbedding(12, 5, 3, 8)
    with pytest.raises(ValueError, match="8 pixels"):
        PatchEmbedding(8, 4, 1, 8)(torch.randn(1, 1, 12, 12))


# --- deepnet and branchnorm


@pytest.mark.parametrize("depth", [1, 6, 18, 100, 1000])
def test_deepnet_constants(depth):
    alpha, beta = deepnorm_constants(depth)
    assert math.isclose(alpha**4, 2 * depth) and math.isclose(beta**-4, 8 * depth)
    assert math.isclose(4 * depth * (beta / alpha) ** 2, 1)


def test_deepnet_translator_constants():
    n, m = 18, 6
    expected = (0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16), (3 * m) ** 0.25, (12 * m) ** -0.25)
    assert torch.allclose(torch.tensor(deepnorm_translator_constants(n, m)), torch.tensor(expected))
    with pytest.raises(ValueError, match="0"):
        deepnorm_constants(0)


@seeds
def test_deepnet_reduces_to_post_norm_and_another_alpha_does_not(seed):
    part, norm, x = FeedForward(8), nn.LayerNorm(8), draw(seed, 2, 3, 8)
    assert contracts.reduces_to(DeepNorm(part, norm, 1.0), PostNorm(part, norm), x)
    assert not contracts.agree(DeepNorm(part, norm, 2.0), PostNorm(part, norm), x)
    assert torch.allclose(DeepNorm(part, norm, 2.0)(x), norm(2 * x + part(x)))


def test_deepnet_keeps_the_first_update_bounded():
    def update(stack):
        x = draw(0, 2, 6, 16)
        before = stack(x)
        (before * draw(1, 2, 6, 16)).sum().backward()
        with torch.no_grad():
            for p in stack.parameters():
                if p.ndim == 2:
                    p -= 1e-3 * p.grad
            return (stack(x) - before).norm().item()

    torch.manual_seed(0)
    few, many = update(deepnorm_stack(5, 16)), update(deepnorm_stack(60, 16))
    assert 0.3 < many / few < 3
    assert update(deep_stack(60, 16, PostNorm)) > 20 * many


@pytest.mark.parametrize("step, expected", [(0, 0.0), (25, 0.25), (100, 1.0), (400, 1.0)])
def test_branchnorm_rises_to_post_norm(step, expected):
    part, norm, x = FeedForward(8), nn.LayerNorm(8), draw(0, 2, 3, 8)
    layer = BranchNorm(part, norm)
    set_branch_scale(layer, step, rise=100)
    assert layer.scale.item() == expected
    assert torch.allclose(layer(x), norm(x + expected * part(x)), atol=1e-6)
    assert bool(contracts.reduces_to(layer, PostNorm(part, norm), x)) == (expected == 1.0)
    assert "scale" in layer.state_dict()
    with pytest.raises(ValueError, match="0"):
        set_branch_scale(layer, 1, rise=0)


# --- layernorm_scaling and deepscalelm


@seeds
def test_layernorm_scaling(seed):
    part, norm, x = FeedForward(8), nn.LayerNorm(8), draw(seed, 2, 3, 8)
    assert contracts.reduces_to(LayerNormScaling(part, norm, 1), PreNorm(part, norm), x)
    for number in (2, 9, 30):
        assert torch.allclose(LayerNormScaling(part, norm, number)(x), x + part(norm(x) / math.sqrt(number)))
    with pytest.raises(ValueError, match="0"):
        LayerNormScaling(part, norm, 0)


def test_layernorm_scaling_grows_like_a_logarithm():
    x = draw(0, 2, 8, 16)
    torch.manual_seed(0)
    plain = signal(deep_stack(60, 16), x).variance[-1]
    scaled = signal(deep_stack(60, 16, layernorm_scaling(60)), x).variance[-1]
    wrong = signal(deep_stack(60, 16, layernorm_scaling(1) * 60), x).variance[-1]  # the same number everywhere
    assert plain > 4 * scaled and wrong > 4 * scaled


@pytest.mark.parametrize("r", [0.0, 0.2, 0.6, 0.9])
def test_deepscalelm_moments_against_sampling(r):
    g = torch.Generator().manual_seed(0)
    common, own = torch.randn(200_000, 1, generator=g), torch.randn(200_000, 2, generator=g)
    x = 1.3 * (r**0.5 * common + (1 - r) ** 0.5 * own)
    given = Moments(0.0, 1.69, r)

    def sampled(y):
        cov = ((y[:, 0] - y.mean()) * (y[:, 1] - y.mean())).mean()
        return y.mean().item(), y.var().item(), (cov / y.var()).item()

    for y, formula in (
        (x.relu(), relu_moments(given)),
        (F.dropout(x.relu(), 0.2), dropout_moments(relu_moments(given), 0.2)),
    ):
        assert torch.allclose(torch.tensor(sampled(y)), torch.tensor(formula), atol=0.02)
    wrong = relu_moments(given)._replace(variance=1.69 / 2)  # forgets the mean
    assert abs(wrong.variance - sampled(x.relu())[1]) > 0.02
    with pytest.raises(ValueError, match="0.5"):
        relu_moments(Moments(0.5, 1.0, 0.0))


def test_deepscalelm_linear_moments_keep_second_moments():
    m = linear_moments(Moments(0.4, 0.84, 0.25), inputs=10, variance=0.1)
    assert math.isclose(m.variance, 1.0) and m.mean == 0
    assert math.isclose(m.correlation, (0.25 * 0.84 + 0.16) / 1.0)


@pytest.mark.parametrize("depth", [2, 10, 192])
def test_deepscalelm_constants(depth):
    keep, add = deepscale_constants(depth)
    assert math.isclose(keep**2 + add**2, 1) and math.isclose(add**2, 2 / depth)
    with pytest.raises(ValueError, match="5"):
        deepscale_constants(depth=4, k=5.0)


@pytest.mark.parametrize("wiring", [Weighted, WeightedPost])
def test_deepscalelm_keeps_the_variance(wiring):
    torch.manual_seed(0)
    x = 0.5 * draw(0, 4, 1, 48) + 0.75**0.5 * draw(1, 4, 24, 48)
    variance = signal(deepscale_stack(64, 48, wiring), x).variance
    assert 0.5 < variance.min() and variance.max() < 2
    torch.manual_seed(0)
    plain = xavier_(deepscale_stack(64, 48, partial(Weighted)))  # right wiring, plain Xavier weights
    assert signal(plain, x).variance[-1] < 0.9 * variance[-1] or signal(plain, x).variance[-1] > 1.1 * variance[-1]


def test_deepscalelm_weights_follow_the_correlation_through_the_blocks():
    torch.manual_seed(0)
    d, r, add = 128, 0.2, 2 / 3
    stack = deepscale_stack(3, d, correlation=r)
    for block in stack.blocks:
        look, feed = block.mix.part, block.feed.part
        q, k, v = look.to_qkv.weight.chunk(3)
        for weight, expected in (
            *((w, 1 / d) for w in (q, k)),
            *((w, r**-0.5 / d) for w in (v, look.to_out.weight)),
            *((w, 1 / d) for w in (feed.up.weight, feed.down.weight)),  # sqrt(2 / (d 2d))
        ):
            assert abs(weight.var().item() / expected - 1) < 0.06
        r = (1 - add) * r + add
        r = (1 - add) * r + add * (r + (math.sqrt(1 - r * r) - r * math.acos(r)) / math.pi)


# --- depth_mup


@pytest.mark.parametrize("depth, power", [(1, 0.5), (4, 0.5), (9, 1.0), (5, 0.0)])
def test_depth_mup_written_out(depth, power):
    net = disturb(ResidualMLP(6, 8, depth, 3, power), 0)
    x = draw(0, 4, 6)
    h = x @ net.first
    for layer in range(depth):
        y = (h @ net.weight[layer]).abs()
        h = h + (y - y.mean(-1, keepdim=True)) / depth**power
    assert torch.allclose(net(x), h @ net.last, atol=1e-4)
    with pytest.raises(ValueError, match="0"):
        ResidualMLP(6, 8, 0, 3)


def test_depth_mup_features_keep_their_size():
    def size(depth, power):
        torch.manual_seed(0)
        return ResidualMLP(32, 64, depth, 3, power).features(draw(0, 64, 32)).square().mean().item()

    assert 0.5 < size(64, 0.5) / size(4, 0.5) < 2
    assert size(64, 0.0) > 100 * size(4, 0.0) and size(64, 1.0) < size(4, 1.0)


# --- denseformer


@pytest.mark.parametrize("depth, dilation, period", [(1, 1, 1), (5, 1, 1), (6, 2, 1), (7, 3, 2), (6, 1, 5), (4, 9, 1)])
def test_denseformer_written_out(depth, dilation, period):
    stack = disturb(DenseStack(deep_stack(depth, 8).blocks, nn.LayerNorm(8), dilation, period), 0)
    x = draw(0, 2, 3, 8)
    states, y, used = [x], x, 0
    for i in range(1, depth + 1):
        y = stack.blocks[i - 1](y)
        states.append(y)
        if i % period == 0:
            sources = [j for j in range(i + 1) if (i - j) % dilation == 0]
            assert len(sources) == math.ceil((i + 1) / dilation) == len(stack.weights[used])
            y = sum(w * states[j] for w, j in zip(stack.weights[used], sources, strict=True))
            used += 1
    assert used == len(stack.weights)
    assert torch.allclose(stack(x), stack.norm(y), atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"dilation": 2}, {"period": 3}, {"dilation": 4, "period": 2}])
def test_denseformer_starts_as_the_plain_stack(how):
    plain, x = deep_stack(5, 8), draw(0, 2, 3, 8)
    fresh = DenseStack(plain.blocks, **how)
    assert torch.equal(fresh(x), plain(x))
    with torch.no_grad():
        fresh.weights[-1][0] += 0.5
    assert not contracts.agree(fresh, plain, x)
    assert torch.allclose(depth_average([x, 2 * x], torch.tensor([3.0, -1.0])), x)
    with pytest.raises(ValueError, match="0"):
        DenseStack(plain.blocks, dilation=0)


def test_denseformer_has_1224_weights_at_48_blocks():
    assert sum(w.numel() for w in DenseStack([nn.Identity()] * 48).weights) == 1224


# --- value_residual and skip_layer_attention


@seeds
def test_value_residual_written_out(seed):
    torch.manual_seed(seed)
    mixer = partial(ValueResidual, first=0.3, own=0.9)
    stack = resformer_stack(3, 8, 2, later=mixer)
    x = draw(seed, 2, 4, 8)
    y, first = x, None
    for block in stack.blocks:
        look = block.mix.part
        q, k, v = look.project(block.mix.norm(y))
        if first is None:
            first = v
        else:
            v = 0.3 * first + 0.9 * v
        heads = (q @ k.mT / 2).softmax(-1) @ v
        y = y + look.to_out(heads.transpose(1, 2).flatten(2))
        y = block.feed(y)
    assert torch.allclose(stack(x), stack.norm(y), atol=1e-5)


@seeds
def test_value_residual_zero_and_one_is_vanilla_and_halves_are_not(seed):
    torch.manual_seed(seed)
    x = draw(seed, 2, 4, 8)
    vanilla = deep_stack(3, 8, norm=nn.LayerNorm(8))
    for later, same in ((partial(ValueResidual, first=0.0, own=1.0), True), (ValueResidual, False)):
        stack = resformer_stack(3, 8, 1, later=later)
        contracts.copy_weights(vanilla, stack)
        assert torch.equal(stack(x), vanilla(x)) == same


def test_value_residual_shared_values_written_out():
    stack, x = resformer_stack(3, 8, 2, later=SharedValue), draw(0, 2, 4, 8)
    y, v = x, None
    for number, block in enumerate(stack.blocks):
        look, z = block.mix.part, block.mix.norm(y)
        if number == 0:
            q, k, v = look.project(z)
        else:
            q, k = (t.view(2, 4, 2, 4).transpose(1, 2) for t in look.to_qkv(z).chunk(2, -1))
        heads = (q @ k.mT / 2).softmax(-1) @ v
        y = block.feed(y + look.to_out(heads.transpose(1, 2).flatten(2)))
    assert torch.allclose(stack(x), stack.norm(y), atol=1e-5)


def test_value_residual_shared_values_are_those_of_the_first_layer():
    stack = resformer_stack(3, 8, 2, later=SharedValue)
    assert isinstance(stack.blocks[0].mix.part, ValueResidual)
    kept, x = [], draw(0, 1, 4, 8)
    for block in stack.blocks:
        x = block(x, kept=kept)
    assert len(kept) == 1
    assert contracts.gradients_reach(stack, draw(1, 1, 4, 8))
    with pytest.raises(ValueError, match="7"):
        SharedValue(7, 2)


@pytest.mark.parametrize("later, tensors", [(ValueResidual, 8), (SharedValue, 5)])
@pytest.mark.parametrize("attend, most", [(causal_attention, 9), (CausalWindow(4), 3)])
def test_value_residual_cache(later, tensors, attend, most):
    """Four layers keep keys and values each; with shared values the keys, and one set of values in all."""
    stack, x = resformer_stack(4, 8, 2, attend=attend, later=later), draw(0, 2, 9, 8)
    with torch.no_grad(), remember(stack) as past:
        pieces = [stack(piece) for piece in x.split([1, 3, 5], 1)]
        assert past.numbers() == tensors * 2 * 8 * most
    assert torch.allclose(torch.cat(pieces, 1), stack(x), atol=1e-5)


def test_value_residual_weighs_both_one_half_by_default():
    stack, x = resformer_stack(2, 8, 2), draw(0, 2, 4, 8)
    first, second = (block.mix for block in stack.blocks)
    _, _, v_first = first.part.project(first.norm(x))
    y = stack.blocks[0](x, kept=[])
    q, k, v = second.part.project(second.norm(y))
    expected = second.part.to_out(merge_heads(attention(q, k, v_first / 2 + v / 2)))
    assert torch.allclose(second.part(second.norm(y), kept=[v_first]), expected, atol=1e-6)


@pytest.mark.parametrize("later", [ValueResidual, SharedValue])
def test_value_residual_is_causal_and_an_open_one_is_found(later):
    x = draw(0, 1, 5, 8)
    assert contracts.causal(resformer_stack(3, 8, 2, attend=causal_attention, later=later), x)
    assert not contracts.causal(resformer_stack(3, 8, 2, attend=attention, later=later), x)


@pytest.mark.parametrize("skipped, back", [(0, 1), (1, 1), (2, 1), (2, 2), (4, 3), (3, 0), (4, 9)])
def test_skip_layer_attention_written_out(skipped, back):
    torch.manual_seed(0)
    stack, x = skip_layer_stack(4, 16, 4, skipped, back), draw(0, 2, 5, 16)
    y, seen = x, []
    for number, block in enumerate(stack.blocks):
        q, k, v = block.mix.part.project(block.mix.norm(y))
        seen.append((k, v))
        heads = []
        for h in range(4):
            below = number - back if h < skipped and number >= back else number
            key, value = (t[:, h] for t in seen[below])
            heads.append((q[:, h] @ key.mT / 2).softmax(-1) @ value)
        y = y + block.mix.part.to_out(torch.cat(heads, -1))
        y = block.feed(y)
    assert torch.allclose(stack(x), stack.norm(y), atol=1e-5)
    vanilla = deep_stack(4, 16, mixer=partial(MultiHeadAttention, 16, 4, bias=False), norm=nn.LayerNorm(16))
    contracts.copy_weights(stack, vanilla)
    assert bool(contracts.agree(stack, vanilla, x)) == (skipped == 0 or back == 0 or back > 3)


def test_skip_layer_attention_is_causal_and_checks_its_arguments():
    x = draw(0, 1, 5, 8)
    assert contracts.causal(skip_layer_stack(3, 8, 2, 1, 1, attend=causal_attention), x)
    for skipped, back in ((3, 1), (-1, 1), (1, -1)):
        with pytest.raises(ValueError, match=str(skipped)):
            SkipLayerAttention(8, 2, skipped, back)


# --- deep_cross_attention


@pytest.mark.parametrize("last", [None, 1, 2, 7])
@seeds
def test_deep_cross_attention_starts_as_pre_norm(seed, last):
    torch.manual_seed(seed)
    plain = deep_stack(4, 8, mixer=partial(MultiHeadAttention, 8, 2, bias=False), norm=nn.LayerNorm(8))
    x = draw(seed, 2, 3, 8)
    fresh = DeepCrossStack(plain, 8, last)
    assert contracts.reduces_to(fresh, plain, x, atol=1e-4)
    assert not contracts.agree(disturb(fresh, seed), plain, x)
    assert contracts.gradients_reach(DeepCrossStack(plain, 8, last), x)


@pytest.mark.parametrize("last", [1, 2, 4])
def test_deep_cross_attention_written_out(last):
    torch.manual_seed(0)
    mixer = partial(MultiHeadAttention, 8, 2, bias=False)
    stack = disturb(DeepCrossStack(deep_stack(4, 8, mixer=mixer, norm=nn.LayerNorm(8)), 8, last), 0, 0.2)
    x = draw(0, 2, 3, 8)

    def read(grn, outputs):
        kept = outputs if len(outputs) <= last + 1 else [outputs[0], sum(outputs[1:-last]), *outputs[-last:]]
        return sum(s * (b + (s @ grn.gate).relu()[..., None]) for s, b in zip(kept, grn.weight, strict=True))

    outputs = [x]
    for block in stack.blocks:
        q, k, v = (read(grn, outputs) for grn in block.read)
        parts = zip((q, k, v), block.mixer.to_qkv.weight.chunk(3), strict=True)
        a, b, c = ((block.norm(t) @ w.T).view(2, 3, 2, 4).transpose(1, 2) for t, w in parts)
        found = block.mixer.to_out(((a @ b.mT / 2).softmax(-1) @ c).transpose(1, 2).flatten(2))
        outputs.append(found + block.feedforward(block.feed_norm(q + found)))
    assert torch.allclose(stack(x), stack.norm(read(stack.read, outputs)), atol=1e-4)


@seeds
def test_deep_cross_attention_residual_in_three_strengths(seed):
    g, b, w = draw(seed, 4, 2, 3, 5), draw(seed + 1, 4, 5), draw(seed + 2, 5)
    gates = (g * w).sum(-1, keepdim=True).relu()
    assert torch.allclose(generalized_residual(g, b, w), sum(g[s] * (b[s] + gates[s]) for s in range(4)), atol=1e-5)
    assert torch.allclose(generalized_residual(g, b), sum(g[s] * b[s] for s in range(4)), atol=1e-5)
    assert torch.allclose(generalized_residual(g, b[:, :1]), sum(g[s] * b[s, 0] for s in range(4)), atol=1e-5)
    assert torch.allclose(generalized_residual(g, torch.ones(4, 1)), g.sum(0), atol=1e-6)
    gate = torch.zeros(5, requires_grad=True)
    generalized_residual(g, b, gate).square().sum().backward()
    assert gate.grad.any()


@pytest.mark.parametrize("count, last", [(1, 2), (3, 2), (4, 2), (7, 2), (7, 0), (5, 9)])
def test_deep_cross_attention_window_keeps_the_sum(count, last):
    outputs = list(draw(0, count, 2, 3, 4))
    kept = window_sources(outputs, last)
    assert len(kept) == min(count, last + 2)
    assert torch.equal(kept[0], outputs[0])
    assert torch.allclose(sum(kept), sum(outputs), atol=1e-5)
    for a, b in zip(kept[::-1][:last], outputs[::-1][:last], strict=False):
        assert torch.equal(a, b)


# --- augmented_shortcuts


@pytest.mark.parametrize("p, q, b", [(1, 1, 5), (3, 2, 4), (2, 3, 1), (1, 4, 7)])
@seeds
def test_augmented_shortcuts_product_is_that_with_the_matrix(seed, p, q, b):
    blocks, x = draw(seed, p, q, b), draw(seed + 1, 2, 3, q * b)
    row = torch.arange(b)
    circulant = blocks[:, :, (row[:, None] - row[None]) % b]  # (p, q, b, b)
    matrix = circulant.permute(0, 2, 1, 3).reshape(p * b, q * b)
    assert torch.allclose(block_circulant(x, blocks), x @ matrix.T, atol=1e-5)
    if b > 2:  # the transposed circulant is another matrix
        assert not torch.allclose(block_circulant(x, blocks.flip(-1)), x @ matrix.T, atol=1e-3)
    with pytest.raises(ValueError, match=str(q * b + 1)):
        block_circulant(torch.randn(2, q * b + 1), blocks)


@seeds
def test_augmented_shortcuts_add_to_the_plain_block(seed):
    part, norm, x = FeedForward(8), nn.LayerNorm(8), draw(seed, 2, 3, 8)
    layer = AugmentedShortcut(part, norm, 8, block=2, paths=2)
    assert sum(p.numel() for p in layer.paths) == 2 * 8 * 8 // 2
    expected = x + part(norm(x)) + sum(F.gelu(block_circulant(norm(x), path)) for path in layer.paths)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    with torch.no_grad():
        for path in layer.paths:
            path.zero_()
    assert contracts.reduces_to(layer, PreNorm(part, norm), x)
    with pytest.raises(ValueError, match="3"):
        AugmentedShortcut(part, norm, 8, block=3)


# --- path_ensemble


@pytest.mark.parametrize("depth", [1, 2, 5])
@seeds
def test_path_ensemble_is_the_sequential_stack(seed, depth):
    torch.manual_seed(seed)
    plain = disturb(deep_stack(depth, 8, norm=nn.LayerNorm(8)), seed, 0.1)
    split = EnsembleScale(plain.blocks, 8, plain.norm)
    x = draw(seed, 2, 3, 8)
    assert contracts.reduces_to(split, plain, x, atol=1e-4)
    paths = path_outputs(plain, x)
    assert len(paths) == 2 * depth + 1 and torch.equal(paths[0], x)
    with torch.no_grad():
        split.scale[-1] = 0
    assert torch.allclose(split(x), plain.norm(sum(paths[:-1])), atol=1e-4)


def test_path_ensemble_needs_pre_norm():
    x = draw(0, 1, 3, 8)
    for wiring in (PostNorm, partial(Weighted, add=0.5)):
        with pytest.raises(ValueError, match="PostNorm|Weighted"):
            path_outputs(deep_stack(1, 8, wiring), x)


# --- all schemes


@pytest.mark.parametrize(
    "make",
    [
        lambda: deep_stack(3, 8, partial(LayerScale, width=8, start=0.5), mixer=causal),
        lambda: deep_stack(3, 8, partial(DeepNorm, alpha=1.5), mixer=causal),
        lambda: deep_stack(3, 8, layernorm_scaling(3), mixer=causal),
        lambda: disturb(DenseStack(deep_stack(3, 8, mixer=causal).blocks), 0),
        lambda: disturb(DeepCrossStack(deep_stack(3, 8, mixer=causal), 8, 1), 0),
        lambda: deep_stack(3, 8, partial(AugmentedShortcut, width=8), mixer=causal),
        lambda: disturb(EnsembleScale(deep_stack(3, 8, mixer=causal).blocks, 8), 0),
    ],
)
def test_causal_mixers_stay_causal_in_every_wiring(make):
    stack = make()
    assert contracts.causal(stack, draw(0, 1, 5, 8))
    for part in stack.modules():
        if isinstance(part, MultiHeadAttention):
            part.attend = attention
    assert not contracts.causal(stack, draw(0, 1, 5, 8))


causal = partial(MultiHeadAttention, 8, 2, attend=causal_attention, bias=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseStack(deep_stack(3, 8, mixer=causal).blocks),
        lambda: resformer_stack(3, 8, 2, attend=causal_attention),
        lambda: resformer_stack(3, 8, 2, attend=causal_attention, later=SharedValue),
        lambda: skip_layer_stack(3, 8, 2, 1, 1, attend=causal_attention),
        lambda: DeepCrossStack(deep_stack(3, 8, mixer=causal), 8, 1),
    ],
)
def test_a_cache_of_keys_and_values_changes_nothing(make):
    model = LanguageModel(TokenEmbedding(11, 8, SinusoidalPositions()), disturb(make(), 0, 0.1))
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids)
        with remember(model):
            pieces = [model(ids[:, t : t + 1], start=t) for t in range(6)]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-4)


def test_stacks_are_stacks():
    for stack in (DenseStack([]), EnsembleScale([], 8), resformer_stack(1, 8, 2), skip_layer_stack(1, 8, 2, 1, 1)):
        assert isinstance(stack, Stack)

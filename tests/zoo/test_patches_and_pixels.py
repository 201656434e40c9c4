"""Identities of chapter 23 on random shapes and seeds, released totals and outputs, and broken variants.

Covers t2t_vit, convmixer, pixel_transformer, tnt, reordering_patches, patchification_scaling and patternformer.
"""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure, pretrained
from tfkit.zoo.attention import MultiHeadAttention, attention, causal_attention
from tfkit.zoo.patches_and_pixels import (
    BasicBlock,
    ConvMixerBlock,
    InOrder,
    NarrowingBlock,
    OrderPolicy,
    PatternStem,
    RowWaves,
    TokensToToken,
    UnscaledPerformer,
    WordStem,
    blown_up_stem,
    convmixer,
    convmixer_768_32,
    convmixer_1024_20,
    convmixer_1536_20,
    examples,
    gumbel_orders,
    hilbert_order,
    patch_bill,
    patternformer,
    performer_between,
    pixel_vit,
    plackett_luce,
    scan_orders,
    shuffle_pixels,
    soft_split,
    t2t_vit,
    t2t_vit_14,
    t2t_vit_19,
    t2t_vit_24,
    tnt,
    tnt_base,
    tnt_small,
)
from tfkit.zoo.transformer import sinusoidal_positions
from tfkit.zoo.vision_transformer import PatchStem, TokenStage, class_pooling, patchify, vit

seeds = pytest.mark.parametrize("seed", range(3))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def disturb(module, seed=0, size=0.3):
    """Move every parameter off its initial value, so that no identity holds by a special start."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(torch.randn(p.shape, generator=g) * size)
    return module.eval()


WAVE = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).sin().view(2, 3, 32, 32)


def peer(path, shapes, **buffers):
    """A file with weights by the formula that the peers were given when their outputs were stored."""
    state = {}
    for name, shape in shapes.items():
        size = torch.Size(shape)
        rows = size[0] if len(size) != 3 else size[0] * size[1]
        state[name] = ((torch.arange(size.numel()) + rows).double().sin() * 0.2).view(size)
    for name in [n for n in buffers.get("norms", ())]:
        width = shapes[f"{name}.weight"]
        state |= {f"{name}.running_mean": torch.zeros(width), f"{name}.running_var": torch.ones(width)}
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, path)
    return path


def pair(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def equals(model, path, layout, expected, atol=1e-10):
    model = pretrained.load(model.double().eval(), path, layout)
    with torch.no_grad():
        assert torch.allclose(model(WAVE), torch.tensor(expected, dtype=torch.float64), atol=atol)


# --- t2t_vit


@seeds
@pytest.mark.parametrize("k, s, h, w, d", [(7, 4, 8, 12, 3), (3, 2, 6, 4, 5), (2, 2, 4, 6, 2), (3, 1, 3, 5, 2)])
def test_soft_split_writes_down_windows_feature_by_feature(seed, k, s, h, w, d):
    x, p = draw(seed, 2, h, w, d), (k - s + 1) // 2
    padded = F.pad(x, (0, 0, p, p, p, p))
    found = soft_split(x, k, s)
    assert found.shape == (2, h // s, w // s, d * k * k)
    for i in range(h // s):
        for j in range(w // s):
            window = padded[:, i * s : i * s + k, j * s : j * s + k]
            assert torch.equal(found[:, i, j], window.permute(0, 3, 1, 2).flatten(1))


@seeds
def test_narrowing_block_is_its_formula(seed):
    block = disturb(NarrowingBlock(12, 6), seed)
    x = draw(seed, 2, 3, 4, 12)
    q, k, v = (block.norm(x.flatten(1, 2)) @ block.to_qkv.weight.T).chunk(3, -1)
    y = v + block.to_out((q @ k.mT / 12**0.5).softmax(-1) @ v)
    expected = (y + block.feed.part(block.feed.norm(y))).unflatten(1, (3, 4))
    assert torch.allclose(block(x), expected, atol=1e-5)
    assert block.to_qkv.bias is None and NarrowingBlock(12, 6, bias=True).to_qkv.bias is not None


@seeds
def test_hard_splits_without_layers_are_a_patch_embedding(seed):
    steps, plain = [(2, 2), (3, 3)], PatchStem(6, 2, 8)
    cut = TokensToToken(steps, [nn.Identity()], nn.Identity())
    order = cut(torch.arange(72.0).view(1, 2, 6, 6)).flatten().long()
    stem = TokensToToken(steps, [nn.Identity()], nn.Linear(72, 8))
    with torch.no_grad():
        stem.project.weight.copy_(plain.cut.weight.flatten(1)[:, order])
        stem.project.bias.copy_(plain.cut.bias)
    x = draw(seed, 2, 2, 12, 18)
    assert torch.allclose(stem(x), plain(x), atol=1e-5)


def test_t2t_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="stride of 4 skips places of kernel 3"):
        soft_split(torch.zeros(1, 4, 4, 1), 3, 4)
    with pytest.raises(ValueError, match="a kernel of 4 with stride 1 has no center"):
        soft_split(torch.zeros(1, 4, 4, 1), 4, 1)
    with pytest.raises(ValueError, match="patches of 4 pixels do not tile 6"):
        soft_split(torch.zeros(1, 6, 8, 1), 7, 4)
    with pytest.raises(ValueError, match="2 splits have 1 layers between them, not 2"):
        TokensToToken([(2, 2), (2, 2)], [nn.Identity()] * 2, nn.Identity())
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"{count} orthogonal vectors in 8"):
            UnscaledPerformer(8, count)


def test_row_waves_start_behind_the_class_token():
    found = RowWaves()(torch.ones(2, 2, 3, 8))
    assert torch.allclose(found.flatten(1, 2), 1 + sinusoidal_positions(7, 8)[1:].expand(2, 6, 8))
    assert torch.allclose(RowWaves(4)(torch.zeros(1, 1, 2, 8))[0, 0], sinusoidal_positions(2, 8, 4))


@seeds
def test_unscaled_performer_is_its_formula(seed):
    layer = UnscaledPerformer(8, 4)
    assert torch.allclose(layer.w @ layer.w.T, 4 * torch.eye(4), atol=1e-5)
    q, k, v = draw(seed, 3, 2, 1, 5, 8).unbind(0)
    phi = lambda x: (x @ layer.w.T - x.square().sum(-1, keepdim=True) / 2).exp()
    weights = phi(q) @ phi(k).mT
    assert torch.allclose(layer(q, k, v), weights / weights.sum(-1, keepdim=True) @ v, atol=1e-5)


def t2t_names(first, second):
    names = {"cls_token": (1, 1, 16)}
    for i, wide in ((1, 147), (2, 72)):
        for name, shape in (first(wide)).items():
            names[f"tokens_to_token.attention{i}.{name}"] = shape
    names |= pair("tokens_to_token.project", 16, 72)
    for i in range(2):
        b = f"blocks.{i}."
        names |= pair(b + "norm1", 16) | {b + "attn.qkv.weight": (48, 16)} | pair(b + "attn.proj", 16, 16)
        names |= pair(b + "norm2", 16) | pair(b + "mlp.fc1", 48, 16) | pair(b + "mlp.fc2", 16, 48)
    return names | pair("norm", 16) | pair("head", 5, 16)


def test_t2t_with_performer_equals_the_reference(tmp_path):
    """Scores of the authors' T2T_ViT(32, "performer", 3, 5, 16, 2, 2, 3.0, token_dim=8) in double precision."""
    expected = [
        [-0.23677813608674914, 0.08243731177514751, -0.08853711572598938, 0.4807958251358195, -0.2395319092418618],
        [-0.2367781507366422, 0.08243732199202047, -0.08853712064467134, 0.4807958243397859, -0.23953190279852565],
    ]
    layer = lambda w: (
        ({"w": (4, 8)} | pair("kqv", 24, w) | pair("proj", 8, 8) | pair("norm1", w) | pair("norm2", 8))
        | (pair("mlp.0", 8, 8) | pair("mlp.2", 8, 8))
    )
    model = t2t_vit(16, 2, 2, inner=8, attend=performer_between(8), classes=5)
    equals(model, peer(tmp_path / "t2t.pth", t2t_names(layer, None)), "t2t", expected, 1e-7)


def test_t2t_with_softmax_equals_the_reference(tmp_path):
    """The same with "transformer"."""
    expected = [
        [-0.2367773346195911, 0.08243660180412632, -0.0885365573719975, 0.4807954656810995, -0.23953177912521978],
        [-0.23677734657868277, 0.08243661008660616, -0.08853656127650023, 0.4807954648769832, -0.23953177368058132],
    ]
    layer = lambda w: (
        (pair("norm1", w) | {"attn.qkv.weight": (24, w)} | pair("attn.proj", 8, 8) | pair("norm2", 8))
        | (pair("mlp.fc1", 8, 8) | pair("mlp.fc2", 8, 8))
    )
    model = t2t_vit(16, 2, 2, inner=8, classes=5)
    equals(model, peer(tmp_path / "t2t.pth", t2t_names(layer, None)), "t2t_softmax", expected, 1e-7)


# Totals that are trained; the reference counts 197 d waves and, with Performer, 2 x 32 x 64 vectors more.
TOTALS = {
    t2t_vit_14: 21_465_806,
    t2t_vit_19: 39_085_070,
    t2t_vit_24: 64_000_974,
    partial(t2t_vit_14, attend=None): 21_465_422,
    partial(t2t_vit_19, attend=None): 39_084_686,
    partial(t2t_vit_24, attend=None): 64_000_590,
    convmixer_768_32: 21_110_248,
    convmixer_1024_20: 24_383_464,
    convmixer_1536_20: 51_625_960,
    tnt_small: 23_768_584,
    tnt_base: 65_428_680,
}


@pytest.mark.parametrize("make, total", TOTALS.items())
def test_published_totals_and_heads(make, total):
    with torch.device("meta"):
        assert measure.parameters(make()) == total
        assert make(classes=7).head.out_features == 7


@pytest.mark.parametrize("make, heads", [(t2t_vit_14, 6), (t2t_vit_19, 7), (t2t_vit_24, 8)])
def test_t2t_has_heads_of_64(make, heads):
    with torch.device("meta"):
        assert {b.mix.part.heads for b in make().stages[0].blocks} == {heads}


# --- convmixer


@seeds
def test_convmixer_block_is_its_formula(seed):
    block = disturb(ConvMixerBlock(6, 3), seed)
    x = draw(seed, 2, 4, 5, 6)
    picture = x.movedim(-1, 1)
    norm = lambda layer, y: layer.weight[:, None, None] * y / (1 + layer.eps) ** 0.5 + layer.bias[:, None, None]
    first, second = block.places[0], block.features[0]
    u = picture + norm(block.places[2], F.gelu(F.conv2d(picture, first.weight, first.bias, padding=1, groups=6)))
    y = norm(block.features[2], F.gelu(F.conv2d(u, second.weight, second.bias)))
    assert torch.allclose(block(x), y.movedim(1, -1), atol=1e-5)


@seeds
def test_convmixer_on_a_ring_moves_with_the_picture(seed):
    for mode, exact in (("circular", True), ("zeros", False)):
        model = disturb(convmixer(8, 2, 3, 4, 5, padding_mode=mode), seed)
        x = draw(seed, 1, 3, 16, 24)
        a, b = (model.features(y)["stage1"] for y in (x, x.roll((4, 8), (2, 3))))
        assert torch.allclose(b, a.roll((1, 2), (2, 3)), atol=1e-4) == exact
        assert torch.allclose(model(x), model.head(a.mean((2, 3))), atol=1e-5)


def test_convmixer_equals_timm(tmp_path):
    """Scores of timm 1.0.31's ConvMixer(16, 2, kernel_size=5, patch_size=4, num_classes=5)."""
    expected = [
        [-0.19282207729627152, 0.04332499730498504, -0.05758061418559712, 0.4606165724501943, -0.23183869802170143],
        [-0.1928213676860998, 0.04333376090655186, -0.05759810888928896, 0.46064131678447107, -0.23186859661216563],
    ]
    names, norms = pair("stem.0", 16, 3, 4, 4) | pair("stem.2", 16), ["stem.2"]
    for i in range(2):
        b = f"blocks.{i}."
        names |= pair(b + "0.fn.0", 16, 1, 5, 5) | pair(b + "0.fn.2", 16)
        names |= pair(b + "1", 16, 16, 1, 1) | pair(b + "3", 16)
        norms += [b + "0.fn.2", b + "3"]
    path = peer(tmp_path / "convmixer.pth", names | pair("head", 5, 16), norms=norms)
    equals(convmixer(16, 2, 5, 4, 5), path, "timm_convmixer", expected)


# --- pixel_transformer


@seeds
def test_pixels_may_be_shuffled_when_positions_move_along(seed):
    model = disturb(pixel_vit(4, 6, 8, 2, 2, hidden=12, classes=5), seed)
    x, order = draw(seed, 2, 3, 4, 6), torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    mixed = copy.deepcopy(model)
    table = mixed.stages[0].positions.table
    table.data = table.data.flatten(0, 1)[order].view_as(table)
    shuffled = shuffle_pixels(x, order)
    assert torch.equal(shuffled.flatten(2), x.flatten(2)[..., order])
    assert torch.allclose(mixed(shuffled), model(x), atol=1e-5)
    assert not torch.allclose(model(shuffled), model(x), atol=1e-3)
    assert model.stages[0].blocks[0].feed.part.up.out_features == 12 and model.tokens is None


def test_shuffling_refuses_what_is_no_permutation():
    for order in (torch.zeros(4), torch.arange(3), torch.arange(1, 5)):
        with pytest.raises(ValueError, match="an order of 4 pixels holds each once"):
            shuffle_pixels(torch.zeros(1, 1, 2, 2), order.long())


# --- tnt


@seeds
def test_word_stem_convolves_each_patch_alone(seed):
    stem = disturb(WordStem(8, 4, 3, 5), seed)
    x = draw(seed, 2, 3, 16, 24)
    found = stem(x)
    assert found.shape == (2, 2, 3, 20) and stem.words == 4
    for i in range(2):
        for j in range(3):
            words = stem.look(x[..., 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]) + stem.places
            assert torch.allclose(found[:, i, j], words.flatten(2).mT.flatten(1), atol=1e-5)
    with pytest.raises(ValueError, match="patches of 3 pixels do not tile 8"):
        WordStem(8, 3, 3, 5)


def small_tnt(seed):
    return disturb(tnt(32, 16, 24, 8, depth=2, heads=(2, 3), classes=5), seed, 0.2)


@seeds
def test_tnt_without_words_is_a_vit(seed):
    from tfkit.zoo.vision_transformer import ImageModel

    model = small_tnt(seed)
    stage, x = model.stages[0], draw(seed, 2, 3, 32, 32)
    rest = TokenStage([b.outer for b in stage.blocks], None, stage.positions)
    stem = nn.Sequential(model.stem, stage.first)
    plain = ImageModel(stem, [rest], model.norm, class_pooling, model.head, model.tokens)
    assert not torch.allclose(model(x), plain(x), atol=1e-3)
    for block in stage.blocks:
        nn.init.zeros_(block.join[1].weight)
        nn.init.zeros_(block.join[2].bias)
    assert torch.allclose(model(x), plain(x), atol=1e-5)


def test_words_see_their_own_sentence_and_sentences_see_all():
    model = small_tnt(0)
    block, owner = model.stages[0].blocks[0], torch.arange(32) // 16
    inner = lambda x: block.inner(x.unflatten(1, (2, 16)).flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1, 2)
    assert contracts.structured(inner, draw(0, 1, 32, 8), owner[:, None] == owner)
    row, words = draw(1, 1, 3, 24), draw(2, 1, 2, 16, 8)
    other = words.clone()
    other[0, 1] += draw(3, 16, 8)
    both = [block(w, row)[1] for w in (words, other)]
    assert ((both[0] - both[1]).abs().amax(-1) > 1e-4).all()


def test_tnt_equals_timm(tmp_path):
    """Scores of timm 1.0.31's TNT(32, 16, embed_dim=24, inner_dim=8, depth=2, num_heads_inner=2, num_heads_outer=3)."""
    expected = [
        [0.2707904402981677, 0.08376660364117094, -0.21270503227021292, -0.23370003000091893, 0.06039874963878186],
        [0.270788001190145, 0.08376023532360366, -0.21270799577306498, -0.23369617579655078, 0.060404982888025094],
    ]
    names = {"cls_token": (1, 1, 24), "patch_pos": (1, 5, 24), "pixel_pos": (1, 8, 4, 4)}
    names |= pair("pixel_embed.proj", 8, 3, 7, 7) | pair("norm1_proj", 128) | pair("proj", 24, 128)
    names |= pair("norm2_proj", 24)
    for i in range(2):
        b = f"blocks.{i}."
        for kind, d in (("in", 8), ("out", 24)):
            mlp = "mlp_in" if kind == "in" else "mlp"
            names |= {f"{b}attn_{kind}.qk.weight": (2 * d, d), f"{b}attn_{kind}.v.weight": (d, d)}
            names |= pair(f"{b}norm_{kind}", d) | pair(f"{b}attn_{kind}.proj", d, d) | pair(f"{b}norm_{mlp}", d)
            names |= pair(f"{b}{mlp}.fc1", 4 * d, d) | pair(f"{b}{mlp}.fc2", d, 4 * d)
        names |= pair(b + "norm1_proj", 128) | {b + "proj.weight": (24, 128)} | pair(b + "norm2_proj", 24)
    path = peer(tmp_path / "tnt.pth", names | pair("norm", 24) | pair("head", 5, 24))
    equals(tnt(32, 16, 24, 8, depth=2, heads=(2, 3), classes=5), path, "timm_tnt", expected)


# --- reordering_patches


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_visits_all_places_in_steps_of_one_and_quarters_one_by_one(side):
    order = hilbert_order(side)
    y, x = order // side, order % side
    assert torch.equal(order.sort().values, torch.arange(side**2))
    assert ((y.diff().abs() + x.diff().abs()) == 1).all() and order[0] == 0 and order[-1] == side - 1
    if side > 1:
        quarter = (2 * y // side + 2 * (2 * x // side)).view(4, -1)
        assert (quarter == quarter[:, :1]).all()


def test_scans_by_hand():
    found = {name: order.tolist() for name, order in scan_orders(3, 3).items()}
    assert found == {
        "row": list(range(9)),
        "column": [0, 3, 6, 1, 4, 7, 2, 5, 8],
        "diagonal": [0, 1, 3, 2, 4, 6, 5, 7, 8],
        "snake": [0, 1, 2, 5, 4, 3, 6, 7, 8],
        "spiral": [0, 1, 2, 5, 8, 7, 6, 3, 4],
    }
    assert scan_orders(2, 3)["column"].tolist() == [0, 3, 1, 4, 2, 5]
    assert scan_orders(2, 3)["diagonal"].tolist() == [0, 1, 3, 2, 4, 5]
    for side in (0, 3, 6, -2):
        with pytest.raises(ValueError, match=f"not {side}"):
            hilbert_order(side)


@seeds
def test_in_order_reads_in_order_and_keeps_places(seed):
    x, order = draw(seed, 2, 6, 8), torch.randperm(6, generator=torch.Generator().manual_seed(seed + 1))
    causal = MultiHeadAttention(8, 2, attend=causal_attention)
    layer = InOrder(causal, order)
    assert torch.allclose(layer(x)[:, order], causal(x[:, order]), atol=1e-6)
    full = MultiHeadAttention(8, 2, attend=attention)
    assert torch.allclose(InOrder(full, order)(x), full(x), atol=1e-5)
    layer.reorder(torch.arange(6))
    assert torch.allclose(layer(x), causal(x), atol=1e-6)


def test_in_order_refuses_what_does_not_fit():
    for order in (torch.tensor([0, 0]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="an order of 2 tokens holds each once"):
            InOrder(nn.Identity(), order)
    with pytest.raises(ValueError, match="of 2 tokens, not of 3"):
        InOrder(nn.Identity(), torch.tensor([1, 0]))(torch.zeros(1, 3, 1))


@seeds
def test_plackett_luce_draws_one_after_another(seed):
    z = draw(seed, 4)
    every = torch.tensor(list(itertools.permutations(range(4))))
    p = plackett_luce(z, every)
    assert torch.allclose(p.exp().sum(), torch.tensor(1.0), atol=1e-5)
    for order, log_p in zip(every.tolist(), p, strict=True):
        left, expected = z.exp(), 1.0
        for i in order:
            expected = expected * left[i] / left.sum()
            left = left.clone()
            left[i] = 0
        assert torch.allclose(log_p.exp(), expected, atol=1e-5)
    drawn = gumbel_orders(z, 10_000, torch.Generator().manual_seed(seed))
    key = lambda o: (o * 4 ** torch.arange(4)).sum(-1)
    found = (key(drawn)[:, None] == key(every)).float().mean(0)
    assert ((found - p.exp()).abs() < 5 * (p.exp() / 10_000).sqrt() + 1e-4).all()
    assert plackett_luce(1000 * z, every).isfinite().all()


def test_order_policy_is_reinforce_with_a_running_mean():
    policy = OrderPolicy(3, memory=0.9)
    with torch.no_grad():
        policy.scores.copy_(torch.tensor([0.0, 2.0, 1.0]))
    assert policy.best().tolist() == [1, 2, 0] and policy.sample(5).shape == (5, 3)
    orders = torch.tensor([[0, 1, 2], [2, 1, 0]])
    logs = plackett_luce(policy.scores, orders)
    assert torch.equal(policy(orders), logs)
    loss = policy.loss(orders, torch.tensor([3.0, 1.0]))
    assert policy.usual == 2.0 and torch.allclose(loss, -(logs * torch.tensor([1.0, -1.0])).mean())
    loss = policy.loss(orders, torch.tensor([4.0, 4.0]))
    assert torch.allclose(policy.usual, torch.tensor(2.2)) and torch.allclose(loss, -(1.8 * logs).mean())
    loss.backward()
    assert policy.scores.grad.abs().sum() > 0


# --- patchification_scaling


@pytest.mark.parametrize("size, patch, width, depth, hidden, classes", [(16, 4, 24, 2, 40, 7), (6, 1, 12, 1, None, 3)])
def test_patch_bill_is_what_the_model_has_and_does(size, patch, width, depth, hidden, classes):
    bill = patch_bill(size, patch, width, depth, hidden=hidden, classes=classes)
    model = vit(size, patch, width, depth, 3, hidden=hidden, classes=classes)
    assert bill.tokens == (size // patch) ** 2 and bill.parameters == measure.parameters(model)
    assert 2 * bill.multiplications == measure.flops(model, torch.rand(1, 3, size, size))
    gray = patch_bill(size, patch, width, depth, hidden=hidden, classes=classes, channels=1)
    assert bill.parameters - gray.parameters == 2 * patch**2 * width
    with pytest.raises(ValueError, match="do not tile"):
        patch_bill(size, size + 1, width, depth)


@seeds
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_repeated_pixels_under_larger_patches_are_the_same_map(seed, factor):
    stem = PatchStem(2, 3, 8, nn.LayerNorm(8))
    x = draw(seed, 2, 3, 4, 6)
    large = x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    assert torch.allclose(blown_up_stem(stem, factor)(large), stem(x), atol=1e-5)
    with pytest.raises(ValueError, match="not 0 times"):
        blown_up_stem(stem, 0)


# --- patternformer


@seeds
def test_channels_are_a_set_and_places_are_not(seed):
    model = disturb(patternformer(6, 4, 8, 2, 2, classes=5), seed)
    x, order = draw(seed, 2, 3, 16, 16), torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    tokens = model.stem(x)
    seen = F.adaptive_avg_pool2d(model.stem.maps(x), 4).flatten(2)
    assert torch.allclose(tokens.squeeze(2), model.stem.project(seen), atol=1e-5)
    scores = model(x)
    maps, model.stem.maps = model.stem.maps, nn.Identity()
    given = maps(x)
    assert torch.allclose(model(given), scores, atol=1e-5)
    assert torch.allclose(model(given[:, order]), scores, atol=1e-4)
    assert not torch.allclose(model(given.flip(2)), scores, atol=1e-3)


def test_the_number_of_patterns_does_not_depend_on_the_picture():
    model = patternformer(6, 4, 8, 1, 2, classes=5).eval()
    for size in (8, 16, 40):
        assert model.stem(torch.rand(1, 3, size, size)).shape == (1, 6, 1, 8)
    assert model.stem.maps(torch.rand(1, 3, 16, 16)).shape == (1, 6, 8, 8)
    assert PatternStem(nn.Identity(), 2, 5)(torch.rand(1, 3, 4, 4)).shape == (1, 3, 1, 5)


@seeds
def test_basic_block_is_its_formula(seed):
    block, x = disturb(BasicBlock(4), seed), draw(seed, 1, 4, 5, 5)
    a, n1, _, b, n2 = block.body
    assert torch.allclose(block(x), (x + n2(b(n1(a(x)).relu()))).relu(), atol=1e-6)


def test_every_paper_has_an_example():
    assert set(examples) == {
        "t2t_vit",
        "convmixer",
        "pixel_transformer",
        "tnt",
        "reordering_patches",
        "patchification_scaling",
        "patternformer",
    }
    assert patchify(torch.zeros(1, 1, 4, 4), 1).shape == (1, 4, 4, 1)

"""Identities of chapter 20 on random shapes and seeds, parity, published totals, and broken variants.

Covers vit, compact_transformer, scaling_vit, three_things, vit_22b and small_dataset_vit.
"""

import copy
import inspect
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.zoo.attention import MultiHeadAttention, attention, watch
from tfkit.zoo.depth_and_residuals import LayerScale
from tfkit.zoo.length_extrapolation import QueryKeyNorm
from tfkit.zoo.transformer import Block, FeedForward, PostNorm, PreNorm
from tfkit.zoo.vision_transformer import (
    AttentionPooling,
    ChannelsFirst,
    CompactBlock,
    ConditionalGrid,
    ConvolutionalStem,
    ExtraTokens,
    Flat,
    FusedParallel,
    ImageModel,
    LayeredStem,
    LearnedGrid,
    LocalityAttend,
    ParallelBlock,
    PatchStem,
    SaturatingLaw,
    SequencePooling,
    ShiftedPatchStem,
    SinusoidalGrid,
    Stage,
    Summed,
    TokenStage,
    _check_images,
    attention_maps,
    attention_rollout,
    attention_without_qkv_bias,
    cct_2_3x2,
    cct_7_3x1,
    cct_14_7x2,
    class_pooling,
    class_token,
    compact,
    compact_blocks,
    cvt_7,
    decay_groups,
    diagonal_shifts,
    examples,
    fit_saturating_law,
    grid_of,
    init_vit_,
    isotropic,
    mean_pooling,
    patchify,
    recut,
    resize_grid,
    rsqrt_schedule,
    shifted_vit,
    tune_attention_only_,
    vit,
    vit_22b,
    vit_base,
    vit_gigantic,
    vit_huge,
    vit_large,
    vit_lite_7,
    vit_small,
    vit_tiny,
)

seeds = pytest.mark.parametrize("seed", range(3))
sizes = pytest.mark.parametrize("b, c, h, w, p", [(1, 1, 2, 3, 2), (2, 3, 4, 2, 4), (3, 2, 1, 5, 3)])


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disturb(module, seed=0, size=0.3):
    """Move every parameter off its initial value, so that no identity holds by a special start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return module


@torch.no_grad()
def dialed(model):
    """Weights by a formula, the same that the peers were given when their outputs were stored."""
    for p in model.parameters():
        rows = p.shape[0] if p.dim() != 3 else p.shape[0] * p.shape[1]
        p.copy_(((torch.arange(p.numel()) + rows).double().sin() * 0.2).view_as(p))
    return model.double().eval()


WAVE = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).sin().view(2, 3, 32, 32)


def small(**options):
    options = {"classes": 5, "hidden": 24} | options
    return disturb(vit(12, 4, 16, 3, 2, **options))


# --- cutting


@sizes
@seeds
def test_patchify_writes_each_patch_as_a_row(seed, b, c, h, w, p):
    x = draw(seed, b, c, h * p, w * p)
    cut = patchify(x, p)
    assert cut.shape == (b, h, w, c * p * p)
    for i in range(h):
        for j in range(w):
            assert torch.equal(cut[:, i, j], x[..., i * p : i * p + p, j * p : j * p + p].flatten(1))


@sizes
@seeds
def test_vit_stem_is_patches_times_a_matrix(seed, b, c, h, w, p):
    stem, x = disturb(PatchStem(p, c, 6), seed), draw(seed, b, c, h * p, w * p)
    expected = patchify(x, p) @ stem.cut.weight.flatten(1).T + stem.cut.bias
    assert torch.allclose(stem(x), expected, atol=1e-5)
    normed = PatchStem(p, c, 6, nn.LayerNorm(6))
    normed.cut.load_state_dict(stem.cut.state_dict())
    assert torch.allclose(normed(x), F.layer_norm(expected, (6,)), atol=1e-5)


STEMS = [
    PatchStem(4, 3, 8),
    LayeredStem(3, 8, (2, 2)),
    ShiftedPatchStem(4, 3, 8),
    ConvolutionalStem(3, [8, 8]),
]


@pytest.mark.parametrize("stem", STEMS, ids=lambda stem: type(stem).__name__)
def test_stems_make_maps_and_refuse_other_channels(stem):
    assert stem.eval()(draw(0, 2, 3, 8, 12)).shape == (2, 2, 3, 8)
    assert stem(draw(0, 0, 3, 8, 12)).shape == (0, 2, 3, 8)
    with pytest.raises(ValueError, match="3 channels, got 2"):
        stem(draw(0, 1, 2, 8, 12))
    if not isinstance(stem, ConvolutionalStem):
        with pytest.raises(ValueError, match="patches of 4 pixels do not tile 8 by 10 pixels"):
            stem(draw(0, 1, 3, 8, 10))
        with pytest.raises(ValueError, match="do not tile 6 by 8 pixels"):
            stem(draw(0, 1, 3, 6, 8))


def test_patches_must_tile():
    with pytest.raises(ValueError, match="patches of 3 pixels do not tile 7 by 6 pixels"):
        patchify(draw(0, 1, 2, 7, 6), 3)
    with pytest.raises(ValueError, match="patches of 5 pixels do not tile 12 pixels"):
        vit(12, 5, 8, 1, 1)
    assert grid_of(12, 4) == 3
    for size, patch in ((12, 0), (12, -4), (0, 4)):
        with pytest.raises(ValueError, match=f"patches of {patch} pixels do not tile {size} pixels"):
            grid_of(size, patch)
    for patch in (0, -4):
        with pytest.raises(ValueError, match=f"patches of {patch} pixels do not tile 8 by 8 pixels"):
            patchify(draw(0, 1, 3, 8, 8), patch)


def test_a_picture_without_its_batch_is_named():
    with pytest.raises(ValueError, match=r"images are \(b, c, H, W\), not \(3, 8, 8\)"):
        _check_images(draw(0, 3, 8, 8), 3, 4)


# --- positions


@seeds
def test_learned_positions_add_their_table_and_resize_it_elsewhere(seed):
    grid, x = LearnedGrid(3, 4, 8), draw(seed, 2, 3, 4, 8)
    assert torch.equal(grid(x), x + grid.table)
    assert 0.01 < grid.table.std() < 0.03
    wide = draw(seed, 2, 6, 5, 8)
    picture = F.interpolate(grid.table.permute(2, 0, 1)[None], (6, 5), mode="bicubic", align_corners=False)
    assert torch.allclose(grid(wide), wide + picture[0].permute(1, 2, 0), atol=1e-6)
    assert not torch.allclose(grid(x.transpose(1, 2)), x.transpose(1, 2) + grid.table.transpose(0, 1))
    fixed = LearnedGrid(3, 4, 8, resize=lambda table, height, width: torch.full((height, width, 8), 2.0))
    assert torch.equal(fixed(wide), wide + 2)


def test_resized_tables():
    assert torch.allclose(resize_grid(torch.ones(3, 4, 2), 5, 9), torch.ones(5, 9, 2), atol=1e-6)
    table = draw(0, 3, 4, 2)
    assert torch.allclose(resize_grid(table, 3, 4), table, atol=1e-6)
    ramp = torch.arange(8.0).view(1, 8, 1).expand(4, 8, 1)
    fine = resize_grid(ramp, 4, 16)[0, :, 0]
    assert torch.allclose(fine + fine.flip(0), torch.full((16,), 7.0), atol=1e-4)  # no shift to either side
    assert (fine.diff() > 0).all() and abs(fine[8] - 4 + 0.25) < 0.1


@pytest.mark.parametrize("h, w", [(2, 3), (4, 1), (5, 5)])
def test_waves_tell_row_and_column(h, w):
    waves = SinusoidalGrid()(torch.zeros(1, h, w, 8))[0]
    for i in range(h):
        for j in range(w):
            for half, place in ((0, i), (4, j)):
                for k in range(2):
                    angle = place * 10000.0 ** (-2 * k / 4)
                    assert math.isclose(waves[i, j, half + 2 * k].item(), math.sin(angle), abs_tol=1e-5)
                    assert math.isclose(waves[i, j, half + 2 * k + 1].item(), math.cos(angle), abs_tol=1e-5)
    with pytest.raises(ValueError, match="4 must divide 6"):
        SinusoidalGrid()(torch.zeros(1, h, w, 6))
    assert SinusoidalGrid()(torch.zeros(1, h, w, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@seeds
def test_conditional_positions_are_a_depthwise_convolution(seed):
    layer, x = disturb(ConditionalGrid(4, 5), seed), draw(seed, 2, 3, 6, 4)
    slow = F.conv2d(x.permute(0, 3, 1, 2), layer.look.weight, layer.look.bias, padding=2, groups=4)
    assert torch.allclose(layer(x), x + slow.permute(0, 2, 3, 1), atol=1e-6)
    assert ConditionalGrid(4).look.weight.shape == (4, 1, 3, 3)
    with pytest.raises(ValueError, match="a kernel of 2 has no center"):
        ConditionalGrid(4, 2)


def test_positions_of_another_width_are_refused():
    for width in (1, 6):
        with pytest.raises(ValueError, match=f"positions are 8 wide, the map {width}"):
            LearnedGrid(4, 4, 8)(torch.zeros(1, 4, 4, width))


# --- stages and the skeleton


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Half(nn.Module):
    def forward(self, x):
        return x[:, ::2, ::2]


def test_a_stage_goes_down_then_adds_positions_then_runs_its_blocks():
    x, tokens = draw(0, 2, 4, 6, 3), draw(1, 2, 1, 3)
    places = LearnedGrid(2, 3, 3)
    y, same = Stage([Times(2), Times(5)], Half(), places)(x, tokens)
    assert torch.allclose(y, (x[:, ::2, ::2] + places.table) * 10, atol=1e-6) and same is tokens
    y, none = Stage([])(x)
    assert torch.equal(y, x) and none is None
    y, changed = TokenStage([Times(2), Times(5)], Half(), places)(x, tokens)
    assert torch.allclose(y, (x[:, ::2, ::2] + places.table) * 10, atol=1e-6)
    assert torch.allclose(changed, tokens * 10) and TokenStage([])(x)[1] is None


class Row(nn.Module):
    def forward(self, x):
        self.seen = x
        return x.flip(1)


def test_extra_tokens_come_first_in_the_row():
    x, tokens, row = draw(0, 2, 3, 4, 5), draw(1, 2, 2, 5), Row()
    y, out = TokenStage([row])(x, tokens)
    assert torch.equal(row.seen, torch.cat([tokens, x.flatten(1, 2)], 1))
    flipped = row.seen.flip(1)
    assert torch.equal(out, flipped[:, :2]) and torch.equal(y, flipped[:, 2:].view(2, 3, 4, 5))


@seeds
def test_a_block_on_rows_is_the_block_on_maps_through_flat(seed):
    norm = partial(nn.LayerNorm, 8)
    mixer, feed, x = disturb(MultiHeadAttention(8, 2), seed), FeedForward(8), draw(seed, 2, 3, 5, 8)
    rows, _ = TokenStage([Block(mixer, feed, norm)])(x)
    maps, _ = Stage([Block(Flat(mixer), feed, norm, partial(LayerScale, width=8, start=1.0))])(x)
    assert torch.allclose(rows, maps, atol=1e-5)


def test_channels_first_runs_picture_layers_on_maps():
    layer, x = nn.Conv2d(3, 5, 3, 2), draw(0, 2, 7, 9, 3)
    assert torch.equal(ChannelsFirst(layer)(x), layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_features_come_by_name_and_tokens_join_late():
    stages = [Stage([Times(2)]), TokenStage([Times(3)], ChannelsFirst(nn.Conv2d(4, 6, 2, 2)))]
    model = ImageModel(PatchStem(2, 3, 4), stages, nn.LayerNorm(6), class_pooling, nn.Linear(6, 5), ExtraTokens(2, 6))
    x = draw(0, 2, 3, 8, 16)
    maps = model.features(x)
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        "stem": (2, 4, 4, 8),
        "stage1": (2, 4, 4, 8),
        "stage2": (2, 6, 2, 4),
    }
    assert torch.equal(maps["stem"].movedim(1, -1), model.stem(x))
    assert torch.equal(maps["stage1"], 2 * maps["stem"])
    names = [(name, tokens.shape) for name, _, tokens in model.states(x)]
    assert names == [("stem", (2, 2, 6)), ("stage1", (2, 2, 6)), ("stage2", (2, 2, 6))]
    token = F.layer_norm(3 * model.tokens.value[0].expand(2, -1), (6,))
    assert torch.allclose(model.encode(x), token, atol=1e-6)
    assert torch.allclose(model(x), model.head(token), atol=1e-6)


def test_pools():
    x, tokens = draw(0, 2, 3, 4, 5), draw(1, 2, 2, 5)
    assert torch.allclose(mean_pooling(x, tokens), x.flatten(1, 2).mean(1), atol=1e-6)
    assert torch.equal(class_pooling(x, tokens), tokens[:, 0])
    with pytest.raises(ValueError, match="no class token"):
        class_pooling(x)


def test_the_norm_stands_before_the_pool():
    model = disturb(isotropic(PatchStem(2, 1, 4), [], 4, 3))
    x = draw(0, 2, 1, 4, 4)
    assert model.pool is mean_pooling and model.norm.eps == 1e-6
    assert torch.allclose(model.encode(x), model.norm(model.stem(x)).mean((1, 2)), atol=1e-6)


def test_isotropic_chooses_the_pool_by_the_tokens():
    tokens = class_token(4)
    model = isotropic(PatchStem(2, 1, 4), [], 4, tokens=tokens)
    assert model.pool is class_pooling and model.head.out_features == 1000
    other = isotropic(PatchStem(2, 1, 4), [], 4, 3, tokens=tokens, pool=mean_pooling, norm=nn.Identity())
    assert other.pool is mean_pooling and isinstance(other.norm, nn.Identity)
    value, where = tokens[0].value, tokens[1].table
    assert torch.equal(tokens(3), (value + where).expand(3, 1, 4))
    assert 0.001 < ExtraTokens(50, 20).value.std() < 0.03


def test_the_start_is_xavier_with_a_silent_head():
    model = init_vit_(vit(8, 4, 64, 1, 2, classes=5))
    block = model.stages[0].blocks[0]
    bound = math.sqrt(6 / 128)
    for weight in block.mix.part.to_qkv.weight.chunk(3):
        assert 0.95 * bound < weight.abs().max() <= bound
    assert 0.95 < block.feed.part.up.weight.abs().max() / math.sqrt(6 / 320) <= 1
    assert not model.head.weight.any() and not block.mix.part.to_qkv.bias.any() and not block.feed.part.up.bias.any()
    assert not model(draw(0, 2, 3, 8, 8)).any()


def test_defaults_of_vit():
    with torch.device("meta"):
        model = vit(hidden=7)
    assert model.stages[0].blocks[0].feed.part.up.out_features == 7
    assert len(model.stages[0].blocks) == 12 and model.stages[0].blocks[0].mix.part.heads == 12
    assert model.norm.eps == model.stages[0].blocks[0].mix.norm.eps == 1e-6
    assert model.stages[0].positions.table.shape == (14, 14, 768)


# --- vit


@seeds
def test_vit_without_positions_ignores_the_order_of_patches(seed):
    model, x = small(), draw(seed, 2, 3, 12, 12)
    cut = F.unfold(x, 4, stride=4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    mixed = F.fold(cut[:, :, order], (12, 12), 4, stride=4)
    assert not torch.allclose(model(x), model(mixed), atol=1e-3)
    nn.init.zeros_(model.stages[0].positions.table)
    assert torch.allclose(model(x), model(mixed), atol=1e-4)


@pytest.mark.parametrize(
    "make, total, size, heads",
    [
        (vit_tiny, 5_717_416, 224, 3),
        (vit_small, 22_050_664, 224, 6),
        (vit_base, 86_567_656, 224, 12),
        (partial(vit_base, patch=32), 88_224_232, 224, 12),
        (partial(vit_base, size=384), 86_859_496, 384, 12),
        (vit_large, 304_326_632, 224, 16),
        (vit_huge, 632_045_800, 224, 16),
        (partial(vit, 224, 14, 1664, 48, 16, hidden=8192), 1_844_440_680, 224, 16),
        (vit_gigantic, 1_882_797_416, 224, 16),
        (cct_7_3x1, 3_760_139, 32, 4),
        (cct_2_3x2, 283_723, 32, 2),
        (cct_14_7x2, 22_367_273, 224, 6),
        (cvt_7, 3_716_619, 32, 4),
        (vit_lite_7, 3_716_874, 32, 4),
    ],
)
def test_published_totals(make, total, size, heads):
    with torch.device("meta"):
        model = make()
    assert measure.parameters(model) == total
    stride = (
        model.stem.cut.stride[0] if hasattr(model.stem, "cut") else size // model.stages[0].positions.table.shape[0]
    )
    assert model.stages[0].positions.table.shape[0] * stride == size
    assert {m.heads for m in model.modules() if isinstance(m, MultiHeadAttention)} == {heads}


@pytest.mark.parametrize("make", [vit_tiny, vit_small, cct_2_3x2, vit_lite_7, cvt_7, cct_7_3x1])
def test_classes_can_be_chosen(make):
    with torch.device("meta"):
        assert make(classes=7).head.out_features == 7


def test_vit_equals_timm():
    """Scores of timm 1.0.31's VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=5)."""
    expected = [
        [-0.19362415890469287, 0.030324063054864417, -0.031877597433654176, 0.4243880320564048, -0.1881525012235581],
        [-0.1936225843418857, 0.030327394671362334, -0.0318855531025124, 0.42439993808565474, -0.1881673493960062],
    ]
    with torch.no_grad():
        found = dialed(vit(32, 8, 16, 2, 2, classes=5))(WAVE)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10)


def test_attention_pooling_equals_timm():
    """Scores of the same model with class_token=False, global_pool="map"."""
    expected = [
        [0.6458846276221759, -0.6985434396907798, 0.5246273717443245, 0.08737101488287069, -0.09916239464232736],
        [0.6458336911791918, -0.6984952549514652, 0.5245860190421019, 0.0874020337579966, -0.09918045297977145],
    ]
    norm = partial(nn.LayerNorm, 16, eps=1e-6)
    blocks = [Block(MultiHeadAttention(16, 2), FeedForward(16), norm) for _ in range(2)]
    model = isotropic(PatchStem(8, 3, 16), blocks, 16, 5, positions=LearnedGrid(4, 4, 16), pool=AttentionPooling(16, 2))
    with torch.no_grad():
        found = dialed(model)(WAVE)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10)


NAMES = {
    "layernorm_before": "mix.norm",
    "layernorm_after": "feed.norm",
    "attention.o_proj": "mix.part.to_out",
    "attention.output.dense": "mix.part.to_out",
    "mlp.fc1": "feed.part.up",
    "mlp.fc2": "feed.part.down",
    "intermediate.dense": "feed.part.up",
    "output.dense": "feed.part.down",
}
QUERIES = {"attention.q_proj": ("k_proj", "v_proj"), "attention.attention.query": ("key", "value")}


def from_transformers(theirs, grid):
    """Our state dict from that of transformers' ViTModel, of version 4 or 5."""
    table = theirs["embeddings.position_embeddings"][0]
    state = {
        "tokens.0.value": theirs["embeddings.cls_token"][0],
        "tokens.1.table": table[:1],
        "stages.0.positions.table": table[1:].view(grid, grid, -1),
    }
    for name, tensor in theirs.items():
        part, w = name.rsplit(".", 1)
        if part.startswith(("layers.", "encoder.layer.")):
            number, part = part.removeprefix("encoder.").split(".", 1)[1].split(".", 1)
            ours = f"stages.0.blocks.{number}."
            if part in NAMES:
                state[f"{ours}{NAMES[part]}.{w}"] = tensor
            elif part in QUERIES:
                last = part.rsplit(".", 1)[1]
                rest = [theirs[name.replace(f".{last}.", f".{other}.")] for other in QUERIES[part]]
                state[f"{ours}mix.part.to_qkv.{w}"] = torch.cat([tensor, *rest])
        elif part == "layernorm":
            state[f"norm.{w}"] = tensor
        elif "projection" in part:
            state[f"stem.cut.{w}"] = tensor
    return state


@seeds
def test_vit_equals_transformers_at_its_size_and_at_another(seed):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        layer_norm_eps=1e-6,
    )
    peer = disturb(transformers.ViTModel(config, add_pooling_layer=False), seed).eval()
    ours = vit(12, 4, 16, 2, 2, hidden=24, classes=3)
    state = from_transformers(peer.state_dict(), 3)
    assert set(state) == {k for k in ours.state_dict() if not k.startswith("head")}
    ours.load_state_dict(state, strict=False)
    x = draw(seed, 2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(ours.encode(x), peer(x).last_hidden_state[:, 0], atol=1e-5)
        x = draw(seed, 2, 3, 20, 24)
        expected = peer(x, interpolate_pos_encoding=True).last_hidden_state
        *_, (_, grid, tokens) = ours.states(x)
        assert torch.allclose(ours.norm(tokens)[:, 0], expected[:, 0], atol=1e-5)
        assert torch.allclose(ours.norm(grid).flatten(1, 2), expected[:, 1:], atol=1e-5)


def test_recut_computes_the_same_and_names_more():
    model, x = small(), draw(0, 2, 3, 12, 12)
    cut = recut(model, [1, 2])
    assert torch.equal(cut(x), model(x)) and list(cut.features(x)) == ["stem", "stage1", "stage2"]
    assert torch.equal(cut.features(x)["stage2"], model.features(x)["stage1"])
    assert [len(stage.blocks) for stage in cut.stages] == [1, 2]
    for depths in ([1, 1], [2, 2], [4, -1], []):
        with pytest.raises(ValueError, match="from stages of"):
            recut(model, depths)
    with pytest.raises(ValueError, match=r"stages of \[1, 2\] blocks from stages of \[1, 2\]"):
        recut(cut, [1, 2])
    below = isotropic(PatchStem(2, 1, 4), [Times(2.0)], 4, 3)
    below.stages[0].down = Half()
    assert recut(below, [1]).features(draw(0, 1, 1, 8, 8))["stage1"].shape == (1, 4, 2, 2)


@seeds
def test_attention_maps_and_rollout(seed):
    model, x = small(), draw(seed, 2, 3, 12, 12)
    maps = attention_maps(model, x)
    assert [tuple(m.shape) for m in maps] == [(2, 2, 10, 10)] * 3
    assert not maps[0].requires_grad
    row = torch.cat([model.tokens(2), model.stages[0].positions(model.stem(x)).flatten(1, 2)], 1)
    first = model.stages[0].blocks[0].mix
    assert torch.allclose(maps[0], first.part.maps(first.norm(row)), atol=1e-6)
    rolled = attention_rollout(maps)
    eye = torch.eye(10)
    steps = [(m.mean(1) + eye) / 2 for m in maps]
    assert torch.allclose(rolled, steps[2] @ steps[1] @ steps[0], atol=1e-6)
    assert torch.allclose(rolled.sum(-1), torch.ones(2, 10), atol=1e-5)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no attention map"):
        attention_rollout([])


def test_hooks_leave_even_when_the_model_stops():
    model = small()
    with pytest.raises(ValueError, match="do not tile"):
        attention_maps(model, draw(0, 1, 3, 13, 12))
    assert not any(m._forward_pre_hooks for m in model.modules())


# --- compact_transformer


@seeds
def test_sequence_pooling_is_a_weighted_mean(seed):
    pool, x = disturb(SequencePooling(6), seed), draw(seed, 2, 3, 4, 6)
    row = x.flatten(1, 2)
    weights = torch.softmax((row @ pool.score.weight[0]) + pool.score.bias, 1)
    assert torch.allclose(pool(x), torch.einsum("bn,bnd->bd", weights, row), atol=1e-6)
    ones = torch.cat([x[..., :5], torch.ones(2, 3, 4, 1)], -1)
    assert torch.allclose(pool(ones)[:, 5], torch.ones(2), atol=1e-6)
    nn.init.zeros_(pool.score.weight)
    assert torch.allclose(pool(x), mean_pooling(x), atol=1e-6)


def test_cct_equals_the_released_code():
    """Scores of CCT(32, embedding_dim=16, two 3 x 3 convolutions, 2 layers, 2 heads, ratio 1, 5 classes), SHI-Labs."""
    expected = [
        [-0.1923567062566245, 0.04968907845640955, -0.07023523300570744, 0.47849011517836393, -0.25341762301198295],
        [-0.20305052879762286, 0.06029323489041842, -0.07985175280001267, 0.48630466087915364, -0.25876845086632894],
    ]
    model = compact(ConvolutionalStem(3, [64, 16]), compact_blocks(2, 16, 2, 16), 16, 8, 5)
    with torch.no_grad():
        found = dialed(model)(WAVE)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10)


@seeds
def test_compact_blocks_norm_the_road(seed):
    (block,) = compact_blocks(1, 8, 2, 12)
    disturb(block, seed)
    x = draw(seed, 2, 5, 8)
    y = block.feed.norm(x + block.mix.part(block.mix.norm(x)))
    assert torch.allclose(block(x), y + block.feed.part(y), atol=1e-6)
    assert isinstance(block, CompactBlock) and block.mix.part.to_qkv.bias is None
    assert block.mix.part.to_out.bias is not None and block.feed.part.up.out_features == 12
    masked = block(x, mask=torch.ones(5, 5, dtype=torch.bool).tril())
    assert not torch.allclose(masked, block(x))


def test_convolutional_stem_by_hand():
    stem, x = ConvolutionalStem(2, [3, 4], kernel=5, stride=2), draw(0, 1, 2, 32, 24)
    y = F.max_pool2d(F.relu(F.conv2d(x, stem.convolutions[0].weight, stride=2, padding=2)), 3, 2, 1)
    y = F.max_pool2d(F.relu(F.conv2d(y, stem.convolutions[1].weight, stride=2, padding=2)), 3, 2, 1)
    assert torch.allclose(stem(x), y.permute(0, 2, 3, 1), atol=1e-6) and y.shape[2:] == (2, 2)
    weight = ConvolutionalStem(16, [64]).convolutions[0].weight
    assert abs(weight.std().item() / math.sqrt(2 / (16 * 9)) - 1) < 0.05


def test_attention_without_biases_takes_an_attend():
    layer = attention_without_qkv_bias(8, 2, QueryKeyNorm(4))
    assert layer.to_qkv.bias is None and isinstance(layer.attend, QueryKeyNorm)


# --- scaling_vit


@pytest.mark.parametrize(
    "law",
    [SaturatingLaw(1.2, 0.35, 0.06, 4.0), SaturatingLaw(0.8, 0.6, 0.0, 0.5), SaturatingLaw(3.0, 1.2, 0.1, 20.0)],
)
@pytest.mark.parametrize("unit", [1.0, 1e9])
def test_a_known_law_is_found_again(law, unit):
    compute = torch.logspace(0, 4, 12, dtype=torch.float64)
    found = fit_saturating_law(compute * unit, law(compute))
    assert math.isclose(found.b, law.b, rel_tol=0.02) and abs(found.c - law.c) < 0.003
    assert math.isclose(found.d, law.d * unit, rel_tol=0.1)
    assert torch.allclose(found(compute * unit), law(compute), rtol=2e-3)


def test_the_law_by_its_formula_and_its_refusals():
    law = SaturatingLaw(2.0, 0.5, 0.1, 3.0)
    assert torch.allclose(law(torch.tensor([1.0, 6.0])), torch.tensor([2 / 2 + 0.1, 2 / 3 + 0.1]))
    six, ones = torch.arange(1.0, 7.0), torch.ones(6)
    for compute, error in ((six[:4], ones[:4]), (ones, six), (six // 2 + 1, ones)):
        with pytest.raises(ValueError, match="five points or more, an error for each; got"):
            fit_saturating_law(compute, error)
    unchecked = inspect.unwrap(fit_saturating_law)  # the shapes as they arrive where no annotation is checked
    for error in (ones[:1], ones[:5]):
        with pytest.raises(ValueError, match=f"got 6 .6 different. and {len(error)} errors"):
            unchecked(six, error)
    for bad in (0.0, -1.0, math.nan, math.inf):
        for compute, error in ((torch.cat([six, torch.tensor([bad])]), torch.ones(7)), (six, torch.tensor([bad] * 6))):
            with pytest.raises(ValueError, match="values must be positive and finite"):
                fit_saturating_law(compute, error)
    straight = fit_saturating_law(torch.logspace(0, 3, 5), torch.logspace(0, 3, 5) ** -0.5)
    assert abs(straight.b - 0.5) < 0.02 and straight.c >= 0 and straight.d >= 0


@seeds
def test_attention_pooling_with_zero_query_is_the_mean_of_values(seed):
    pool, x = disturb(AttentionPooling(8, 2, 12), seed), draw(seed, 2, 3, 4, 8)
    assert pool.feed.part.up.out_features == 12
    row, look = x.flatten(1, 2), pool.look
    mean = look.to_out(look.to_kv(row)[..., 8:].mean(1))
    nn.init.zeros_(pool.query)
    assert not torch.allclose(pool(x), pool.feed(mean[:, None])[:, 0], atol=1e-4)
    nn.init.zeros_(look.to_q.bias)
    assert torch.allclose(pool(x), pool.feed(mean[:, None])[:, 0], atol=1e-5)
    assert AttentionPooling(8, 2).feed.norm.eps == 1e-6


def test_recipe_of_scaling():
    model = small()
    head, body = decay_groups(model)
    assert (head["weight_decay"], body["weight_decay"]) == (3.0, 0.03)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert len(head["params"]) + len(body["params"]) == len(list(model.parameters()))
    assert {g["weight_decay"] for g in decay_groups(model, 1.0, 0.5)} == {1.0, 0.5}
    rate = [rsqrt_schedule(s, 100, 10, 20) for s in range(100)]
    assert rate[:10] == [pytest.approx((s + 1) / 10) for s in range(10)]
    assert rate[39] == pytest.approx(0.5) and rate[79] == pytest.approx(math.sqrt(10 / 80))
    assert rate[90] == pytest.approx(math.sqrt(10 / 91) * 0.5)
    assert rate[:80] == [rsqrt_schedule(s, 200, 10, 20) for s in range(80)]
    assert rsqrt_schedule(100, 100, 10, 20) == rsqrt_schedule(103, 100, 10, 20) == 0
    assert rsqrt_schedule(0, 3, 1, 1) == 1
    for warmup, cooldown in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=f"warmup {warmup} and cooldown {cooldown}"):
            rsqrt_schedule(0, 10, warmup, cooldown)


# --- three_things


def blocks_of(width, count, seed):
    norm = partial(nn.LayerNorm, width)
    return [disturb(Block(MultiHeadAttention(width, 2), FeedForward(width), norm), seed + i, 0.1) for i in range(count)]


@seeds
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parallel_blocks(seed, count):
    blocks, x = blocks_of(8, count, seed), draw(seed, 2, 5, 8)
    y = x + sum(b.mix.part(b.mix.norm(x)) for b in blocks)
    expected = y + sum(b.feed.part(b.feed.norm(y)) for b in blocks)
    assert torch.allclose(ParallelBlock(*blocks)(x), expected, atol=1e-5)
    if count == 1:
        assert torch.allclose(ParallelBlock(*blocks)(x), blocks[0](x), atol=1e-5)


def test_parallel_blocks_want_pre_norm():
    block = Block(MultiHeadAttention(8, 2), FeedForward(8), partial(nn.LayerNorm, 8), PostNorm)
    with pytest.raises(ValueError, match="only PreNorm runs in parallel, not PostNorm"):
        ParallelBlock(block)


def test_parallel_and_sequential_differ_at_second_order():
    gaps, sizes = [], [0.4, 0.2, 0.1, 0.05]
    x = draw(0, 2, 5, 8).double()
    for eps in sizes:
        blocks = [copy.deepcopy(b).double() for b in blocks_of(8, 2, 0)]
        for block in blocks:
            for last in (block.mix.part.to_out, block.feed.part.down):
                for p in last.parameters():
                    p.data *= eps
        gaps.append((nn.Sequential(*blocks)(x) - ParallelBlock(*blocks)(x)).norm().item())
    assert 1.9 < measure.growth(sizes, gaps).exponent < 2.1


def test_attention_alone_is_tuned():
    with torch.device("meta"):
        model = tune_attention_only_(vit_small())
    assert measure.parameters(model) == 7_096_320
    moving = {name for name, p in small().named_parameters() if ".mix.part." in name}
    model = tune_attention_only_(small())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moving
    fused = nn.Sequential(FusedParallel(8, 2, 12))
    with pytest.raises(ValueError, match="Sequential has no MultiHeadAttention to tune"):
        tune_attention_only_(fused)
    assert all(p.requires_grad for p in fused.parameters())


@seeds
def test_layered_stem_keeps_patches_apart(seed):
    stem, x = disturb(LayeredStem(3, 8, (2, 3)), seed).eval(), draw(seed, 1, 3, 12, 18)
    g = torch.Generator().manual_seed(seed)
    i, j = (int(torch.randint(n, (1,), generator=g)) for n in (2, 3))
    poked = x.clone()
    poked[..., 6 * i : 6 * i + 6, 6 * j : 6 * j + 6] += 1
    changed = (stem(poked) - stem(x)).abs().amax(-1)[0] > 1e-6
    assert changed.sum() == 1 and changed[i, j]
    visible = torch.rand(1, 2, 3, generator=g) < 0.5
    pixels = visible.repeat_interleave(6, 1).repeat_interleave(6, 2)[:, None]
    assert torch.allclose(stem(x * pixels)[visible], stem(x)[visible], atol=1e-6)


def test_layered_stem_by_its_layers():
    stem = LayeredStem(3, 16)
    kinds = [type(layer).__name__ for layer in stem.layers]
    assert kinds == ["Conv2d", "BatchNorm2d", "GELU"] * 2 + ["Conv2d", "BatchNorm2d"]
    convolutions = [layer for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(3, 4), (4, 4), (4, 16)]
    assert [c.kernel_size + c.stride for c in convolutions] == [(4,) * 4, (2,) * 4, (2,) * 4]
    assert isinstance(LayeredStem(3, 8, (2,), norm=nn.InstanceNorm2d).layers[1], nn.InstanceNorm2d)
    with pytest.raises(ValueError, match="4 must divide 6"):
        LayeredStem(3, 6)


# --- vit_22b


@seeds
def test_query_key_norm(seed):
    attend = disturb(QueryKeyNorm(4), seed)
    q, k, v = (draw(seed + i, 2, 3, 5, 4) for i in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = attention(attend.q(q), attend.k(k), v, mask)
    assert torch.allclose(attend(q, k, v, mask=mask), expected, atol=1e-6)
    assert not torch.allclose(attend.q(q), attend.k(q))
    for a, b in ((50.0, 1.0), (1.0, 20.0), (7.0, 90.0)):
        assert torch.allclose(attend(a * q, b * k, v), attend(q, k, v), atol=1e-2)
    assert not torch.allclose(attention(50 * q, k, v), attention(q, k, v), atol=0.1)


def test_query_key_norm_bounds_the_logits():
    attend, q = QueryKeyNorm(16), 1e4 * draw(0, 1, 1, 50, 16)
    logits = attend.q(q) @ attend.k(q).mT / 4
    assert logits.max() <= 4 + 1e-4
    rms = QueryKeyNorm(4, nn.RMSNorm, lambda q, k, v: torch.stack([q, k, v]))
    normed = rms(*(draw(i, 1, 1, 2, 4) for i in range(3)))
    assert torch.allclose(normed[:2].square().mean(-1), torch.ones(2, 1, 1, 2), atol=1e-3)
    assert torch.equal(normed[2], draw(2, 1, 1, 2, 4))


@seeds
def test_fused_parallel_is_the_sum_of_attention_and_feedforward(seed):
    fused, x = disturb(FusedParallel(8, 2, 12, QueryKeyNorm(4)), seed), draw(seed, 2, 5, 8)
    look, feed = MultiHeadAttention(8, 2, attend=fused.attend, bias=False), FeedForward(8, 12)
    with torch.no_grad():
        look.to_qkv.weight.copy_(fused.to_in.weight[:24])
        feed.up.weight.copy_(fused.to_in.weight[24:])
        feed.up.bias.copy_(fused.bias)
        look.to_out.weight.copy_(fused.to_out.weight[:, :8])
        feed.down.weight.copy_(fused.to_out.weight[:, 8:])
        feed.down.bias.copy_(fused.to_out.bias)
    assert contracts.reduces_to(Summed(look, feed), fused, x)
    with pytest.raises(ValueError, match="width 8 does not divide into 3 heads"):
        FusedParallel(8, 3, 12)


def test_fused_parallel_shows_its_attention_to_those_who_watch():
    """`watch` of chapter 01 finds the layer, sees queries, keys and values, and may change the pattern."""
    fused, x = disturb(FusedParallel(8, 2, 12, QueryKeyNorm(4)), 0), draw(0, 2, 5, 8)
    with watch(fused) as seen:
        assert torch.equal(fused(x), before := fused(x))
    (last,) = seen.values()
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in fused.to_in(x).split(fused.cuts, -1)[:3])
    assert torch.equal(last.q, q) and torch.equal(last.k, k) and torch.equal(last.v, v)
    with watch(fused, lambda name, seen: setattr(seen, "v", 0 * seen.v)):
        hidden = F.gelu(fused.to_in(x)[..., 24:] + fused.bias)
        alone = F.linear(hidden, fused.to_out.weight[:, 8:], fused.to_out.bias)
        assert torch.allclose(fused(x), alone, atol=1e-6)
    assert torch.equal(fused(x), before)


def test_summed_adds():
    x = draw(0, 2, 3, 4)
    assert torch.allclose(Summed(Times(2.0), Times(-0.5), nn.Identity())(x), 2.5 * x)


def test_vit_22b_counts():
    with torch.device("meta"):
        model = vit_22b()
    blocks = model.stages[0].blocks
    assert sum(b.part.to_in.weight.numel() + b.part.to_out.weight.numel() for b in blocks) == 21_743_271_936
    assert measure.parameters(model) == 22_209_455_080
    assert len(blocks) == 48 and all(isinstance(b, PreNorm) for b in blocks)
    assert blocks[0].part.heads == 48 and isinstance(blocks[0].norm, nn.RMSNorm) and blocks[0].part.to_in.bias is None
    assert blocks[0].part.attend.q.normalized_shape == (128,) and isinstance(model.norm, nn.RMSNorm)
    assert model.stages[0].positions.table.shape == (16, 16, 6144)
    assert blocks[0].norm.eps == blocks[0].part.attend.k.eps == 1e-6


# --- small_dataset_vit


@seeds
def test_diagonal_shifts(seed):
    x = draw(seed, 2, 3, 7, 9)
    views = diagonal_shifts(x, 2).unflatten(1, (5, 3))
    assert torch.equal(views[:, 0], x)
    for k, (dy, dx) in enumerate([(2, 2), (2, -2), (-2, 2), (-2, -2)], 1):
        expected = x.roll((dy, dx), (2, 3))
        rows, columns = torch.arange(7), torch.arange(9)
        keep_y = (rows >= dy) if dy > 0 else (rows < 7 + dy)
        keep_x = (columns >= dx) if dx > 0 else (columns < 9 + dx)
        assert torch.equal(views[:, k], expected * (keep_y[:, None] & keep_x))


@seeds
def test_shifted_stem_norms_and_projects_five_patches(seed):
    stem, x = disturb(ShiftedPatchStem(4, 2, 6), seed), draw(seed, 2, 2, 8, 12)
    assert stem.project.in_features == 5 * 2 * 4**2
    expected = stem.project(stem.norm(patchify(diagonal_shifts(x, 2), 4)))
    assert torch.allclose(stem(x), expected, atol=1e-6)


@seeds
def test_locality_never_looks_at_itself(seed):
    attend = LocalityAttend(2, 4)
    assert torch.equal(attend.temperature, torch.full((2,), 2.0))
    q, k, v = (draw(seed + i, 2, 2, 5, 4) for i in range(3))
    disturb(attend, seed, 0.2)
    scores = q @ k.mT / attend.temperature[:, None, None]
    weights = scores.masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf).softmax(-1)
    assert torch.allclose(attend(q, k, v), weights @ v, atol=1e-5)
    layer = MultiHeadAttention(8, 2, attend=attend)
    assert not layer.maps(draw(seed, 2, 5, 8)).diagonal(dim1=-2, dim2=-1).any()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    masked = scores.masked_fill(~(mask & ~torch.eye(5, dtype=torch.bool)), -torch.inf)[..., 1:, :].softmax(-1)
    assert torch.allclose(attend(q, k, v, mask=mask)[..., 1:, :], masked @ v, atol=1e-5)


def test_locality_without_its_mask_is_attention():
    attend = LocalityAttend(2, 4)
    q, k, v = (draw(i, 2, 2, 5, 4) for i in range(3))
    others = torch.cat([torch.cat([k, k], -2)], 0)  # every key twice, so the diagonal leaves a copy of each
    scores = q @ others.mT / attend.temperature[:, None, None]
    assert torch.allclose(scores.softmax(-1) @ torch.cat([v, v], -2), attention(q, k, v), atol=1e-5)
    for n, m in ((3, 4), (1, 1)):
        with pytest.raises(ValueError, match=f"each of {n} queries needs another among {m} keys"):
            attend(draw(0, 1, 2, n, 4), draw(0, 1, 2, m, 4), draw(0, 1, 2, m, 4))
    for heads in (1, 3):
        with pytest.raises(ValueError, match=f"temperatures for {heads} heads, but q has 2"):
            LocalityAttend(heads, 4)(q, k, v)


def test_shifted_vit_is_put_together_as_the_paper_says():
    model = shifted_vit(16, 4, 8, 2, 2, hidden=12, classes=5, channels=1)
    assert isinstance(model.stem, ShiftedPatchStem) and model.stem.channels == 1
    layers = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    assert len(layers) == 2 and all(isinstance(m.attend, LocalityAttend) and m.to_qkv.bias is None for m in layers)
    assert layers[0].attend is not layers[1].attend and layers[0].attend.temperature[0] == 2.0
    assert model.stages[0].positions.table.shape == (4, 4, 8) and model.pool is class_pooling
    assert model.stages[0].blocks[0].feed.part.up.out_features == 12
    assert disturb(model)(draw(0, 2, 1, 16, 16)).shape == (2, 5)


# --- what an engineer takes for granted


@pytest.mark.parametrize("name", examples)
def test_examples_pickle_and_run_in_sixteen_bits_and_on_no_image(name):
    torch.manual_seed(0)
    model, (x,) = examples[name]()
    model.eval()
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin(x), expected) and model(x[:0]).shape == (0, 5)
        found = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16 and (found.float() - expected).norm() < 0.1 * (1 + expected.norm())


@pytest.mark.parametrize("name", examples)
def test_every_image_stands_alone(name):
    torch.manual_seed(0)
    model, (x,) = examples[name]()
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)

"""Identities of chapter 22 on random shapes and seeds, released totals and outputs, and broken variants.

Covers navit, apt_patches, flexivit, resformer, mspe and elastic_sampling.
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

from tfkit import measure
from tfkit.zoo import any_resolution
from tfkit.zoo.any_resolution import (
    AdaptiveStem,
    AdaptiveViT,
    ElasticViT,
    FactorizedPositions,
    FlexiStem,
    GriddedStage,
    LocalValueAttention,
    MultiScaleStem,
    NaViT,
    NormalizedWaves,
    PackedImages,
    PackedPooling,
    absolute_places,
    corner_waves,
    crop_boxes,
    examples,
    first_fit,
    flexible_copy,
    flexivit,
    fractional_places,
    grid_boxes,
    multi_scale_,
    navit,
    normalized_waves,
    pack_images,
    packed_at,
    patch_entropy,
    patch_mix,
    pi_resize,
    pool_owned,
    quadtree,
    random_boxes,
    resformer,
    resformer_base,
    resformer_small,
    resformer_tiny,
    resize_matrix,
    run_packed,
    scale_consistency,
    spread_tokens,
)
from tfkit.zoo.attention import MultiHeadAttention
from tfkit.zoo.transformer import Block, FeedForward
from tfkit.zoo.vision_transformer import (
    AttentionPooling,
    LearnedGrid,
    PatchStem,
    QueryKeyNorm,
    class_pooling,
    isotropic,
    mean_pooling,
    patchify,
    vit,
)

seeds = pytest.mark.parametrize("seed", range(3))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disturb(module, seed=0, size=0.3):
    """Move every parameter off its initial value, so that no identity holds by a special start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return module.eval()


# --- navit

SHAPES = [(8, 12), (16, 4), (4, 4), (12, 12), (4, 20)]


def pictures(seed, channels=3):
    return [draw(seed + i, channels, *shape) for i, shape in enumerate(SHAPES)]


def packer(where=absolute_places, length=8, **options):
    return disturb(navit(4, 16, 2, 2, positions=FactorizedPositions(length, 16, where), classes=5, **options))


@seeds
def test_first_fit_holds_every_item_once_and_keeps_to_the_capacity(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (40,), generator=g).tolist()
    rows = first_fit(lengths, 12)
    assert sorted(i for row in rows for i in row) == list(range(40))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= 12
    assert sum(n <= 6 for n in used) <= 1  # two half empty rows would have been joined
    at, count = packed_at(lengths, 12)
    assert count == len(rows) and len(set(at.tolist())) == sum(lengths) and at.max() < 12 * count
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for i in range(len(lengths)):
        own = at[starts[i] : starts[i + 1]]
        assert (own.diff() == 1).all() and own[0] // 12 == own[-1] // 12
        assert i in rows[int(own[0]) // 12]


def test_first_fit_by_hand_and_its_refusals():
    assert first_fit([6, 4, 2], 8) == [[0, 2], [1]]
    assert first_fit([2, 4, 2, 4], 6) == [[1, 0], [3, 2]]
    assert first_fit([], 8) == []
    for n in (0, 9):
        with pytest.raises(ValueError, match=f"a row of 8 tokens cannot hold an item of {n}"):
            first_fit([3, n], 8)


@seeds
def test_packing_writes_down_patches_places_grids_and_owners(seed):
    images = pictures(seed)
    batch = pack_images(images, 4, 12)
    assert isinstance(batch, PackedImages)
    for i, (image, (H, W)) in enumerate(zip(images, SHAPES, strict=True)):
        own = batch.owner == i
        assert own.sum() == H * W // 16 and (batch.grids[own] == torch.tensor([H // 4, W // 4])).all()
        y, x = batch.places[own].T
        assert torch.equal(batch.patches[own], patchify(image[None], 4)[0, y, x])
        assert len(batch.places[own].unique(dim=0)) == len(y)
    empty = batch.owner == -1
    assert not batch.patches[empty].any() and (batch.grids[empty] == 1).all() and not batch.places[empty].any()


@seeds
@pytest.mark.parametrize("where", [absolute_places, fractional_places])
def test_navit_packed_logits_are_those_of_each_image_alone(seed, where):
    model, images = packer(where), pictures(seed)
    packed = model(*pack_images(images, 4, 12))
    alone = torch.cat([model(*pack_images([x], 4, x[0].numel() // 16)) for x in images])
    assert packed.shape == (5, 5) and torch.allclose(packed, alone, atol=1e-5)
    assert torch.allclose(packed, model(*pack_images(images, 4, 31)), atol=1e-5)  # rows of another length
    other = [images[0] + 1, *images[1:]]
    changed = (model(*pack_images(other, 4, 12)) - packed).abs().amax(1)
    assert changed[0] > 1e-3 and changed[1:].max() < 1e-6


def test_empty_places_are_read_by_nobody():
    model, batch = packer(), pack_images(pictures(0), 4, 12)
    noisy = batch._replace(patches=torch.where((batch.owner < 0)[..., None], 7.0, batch.patches))
    assert torch.allclose(model(*noisy), model(*batch), atol=1e-6)


def test_dropped_patches_are_missing_tokens():
    model, images = packer(), pictures(0)
    keep = [torch.tensor([0, 4, 5]), torch.tensor([3]), torch.tensor([0]), torch.arange(9), torch.tensor([1, 2])]
    scores = model(*pack_images(images, 4, 12, keep))
    for i, kept in enumerate(keep):
        whole = pack_images([images[i]], 4, images[i][0].numel() // 16)
        assert torch.allclose(scores[i : i + 1], model(*(field[:, kept] for field in whole)), atol=1e-5)


def test_packing_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="there is no image to pack"):
        pack_images([], 4, 8)
    with pytest.raises(ValueError, match="a row of 5 tokens cannot hold an item of 6"):
        pack_images([draw(0, 3, 8, 12)], 4, 5)
    with pytest.raises(ValueError, match="patches of 5 pixels do not tile 8 by 12 pixels"):
        pack_images([draw(0, 3, 8, 12)], 5, 8)
    with pytest.raises(ValueError, match="patches have 75 numbers, the embedding reads 48"):
        packer()(*pack_images([draw(0, 3, 5, 10)], 5, 8))
    batch, unchecked = pack_images(pictures(0), 4, 12), inspect.unwrap(NaViT.forward)
    with pytest.raises(ValueError, match=r"got \(12, 48\) and \(\d, 12\)"):
        unchecked(packer(), batch.patches[0], *batch[1:])
    with pytest.raises(ValueError, match=r"got \(\d, 0, 48\) and \(\d, 0\)"):
        packer()(*(field[:, :0] for field in batch))
    assert packer()(*(field[:0] for field in batch)).shape == (0, 5)


@seeds
def test_factorized_positions_add_a_row_and_a_column(seed):
    layer = disturb(FactorizedPositions(6, 8), seed)
    assert layer.row.shape == layer.column.shape == (6, 8)
    assert 0.005 < FactorizedPositions(40, 40).row.std() < 0.04
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    found = layer(places, torch.full_like(places, 6))
    assert torch.equal(found, layer.row[places[:, 0]] + layer.column[places[:, 1]])
    between = FactorizedPositions(6, 8, lambda p, g, n: p + 0.25)
    between.load_state_dict(layer.state_dict())
    rows = 0.75 * layer.row[2] + 0.25 * layer.row[3]
    columns = 0.75 * layer.column[0] + 0.25 * layer.column[1]
    assert torch.allclose(between(torch.tensor([2, 0]), torch.tensor([6, 6])), rows + columns, atol=1e-6)
    for place in ([6, 0], [0, 7]):
        with pytest.raises(ValueError, match=f"place {max(place)} lies beyond tables of 6 rows"):
            layer(torch.tensor(place), torch.tensor([8, 8]))
    assert layer(places[:0], places[:0]).shape == (0, 8)


def test_fractional_places_are_shares_of_the_sides():
    grid = torch.tensor([4, 2]).expand(4, 2)
    places = torch.tensor([[0, 0], [1, 1], [3, 0], [2, 1]])
    found = fractional_places(places, grid, 8)
    assert torch.allclose((found + 0.5) / 8, (places + 0.5) / grid)
    assert torch.equal(fractional_places(places, torch.full_like(grid, 8), 8), places.float())
    assert torch.equal(absolute_places(places, grid, 8), places.float())
    edge = FactorizedPositions(4, 8, fractional_places)
    fine = torch.tensor([[0, 0], [15, 15]])  # beyond the middle of the first and the last entry
    found = edge(fine, torch.full_like(fine, 16))
    assert torch.equal(found[0], edge.row[0] + edge.column[0])
    assert torch.equal(found[1], edge.row[-1] + edge.column[-1])


def test_packed_pooling_is_attention_pooling_of_each_image():
    pool, x = disturb(PackedPooling(8, 2)), draw(0, 2, 6, 8)
    owner = torch.tensor([[0, 0, 2, 2, 2, -1], [1, 1, 1, 1, -1, -1]])
    found = pool(x, owner)
    for i in range(3):
        assert torch.allclose(found[i : i + 1], AttentionPooling.forward(pool, x[owner == i][None, None]), atol=1e-5)
    assert pool(x[:0], owner[:0]).shape == (0, 8)


def test_navit_is_put_together_as_the_paper_says():
    model = navit(4, 16, 2, 2, positions=FactorizedPositions(8, 16), hidden=20, classes=7, channels=1)
    assert isinstance(model, NaViT) and model.embed.in_features == 16 and model.head.out_features == 7
    blocks = model.stack.blocks
    assert len(blocks) == 2 and blocks[0].feed.part.up.out_features == 20 and blocks[0].feed.part.up.bias is None
    assert isinstance(blocks[0].mix.part.attend, QueryKeyNorm) and blocks[0].mix.part.attend.q.normalized_shape == (8,)
    assert blocks[0].mix.part.attend is not blocks[1].mix.part.attend and blocks[0].mix.norm.bias is None
    assert blocks[0].mix.part.to_qkv.bias is None and blocks[0].mix.norm.eps == model.stack.norm.eps == 1e-6
    assert not model.head.weight.any() and model.pool.look.heads == 2


# --- flexivit


@pytest.mark.parametrize("old, new", [(4, 8), (3, 5), (6, 9), (5, 5)])
@seeds
def test_flexivit_tokens_of_enlarged_patches_stay(seed, old, new):
    w, x = draw(seed, 6, 2, old, old), draw(seed + 1, 10, 2, old, old)
    large = F.interpolate(x, (new, new), mode="bilinear", align_corners=False)
    tokens = x.flatten(1) @ w.flatten(1).T
    assert torch.allclose(large.flatten(1) @ pi_resize(w, new, new).flatten(1).T, tokens, atol=1e-4)
    if new != old:
        naive = F.interpolate(w, (new, new), mode="bilinear") * (old / new) ** 2
        assert not torch.allclose(large.flatten(1) @ naive.flatten(1).T, tokens, atol=0.1)


@pytest.mark.parametrize("old, new", [((8, 8), (5, 5)), ((6, 4), (3, 7)), ((4, 5), (9, 6)), ((6, 6), (1, 1))])
def test_pi_resize_is_the_pseudo_inverse_of_the_large_matrix(old, new):
    w = draw(0, 3, 2, *old)
    B = torch.kron(resize_matrix(old[0], new[0]), resize_matrix(old[1], new[1]))
    expected = w.double().flatten(-2) @ torch.linalg.pinv(B.T).T
    assert torch.allclose(pi_resize(w, *new).double(), expected.unflatten(-1, new), atol=1e-5)
    x = draw(1, 1, 1, *old)
    resized = F.interpolate(x, new, mode="bilinear", align_corners=False)
    assert torch.allclose(B.float() @ x.flatten(), resized.flatten(), atol=1e-5)
    narrow = pi_resize(w.bfloat16(), *new)
    assert narrow.dtype == torch.bfloat16 and torch.allclose(
        narrow.float(), expected.unflatten(-1, new).float(), atol=0.1
    )
    with pytest.raises(ValueError, match="a patch of 0 by 3 pixels has no pixel"):
        pi_resize(w, 0, 3)


def test_flexi_stem_resizes_its_weight_and_tiles():
    stem, x = disturb(FlexiStem(6, 3, 8)), draw(0, 2, 3, 24, 12)
    for patch in (3, 4, 6, 12):
        stem.patch = patch
        w = pi_resize(stem.weight, patch, patch)
        expected = patchify(x, patch) @ w.flatten(1).T + stem.bias
        assert torch.allclose(stem(x), expected, atol=1e-4)
    assert FlexiStem(6, 3, 8, 2).patch == 2 and FlexiStem(6, 3, 8).patch == 6
    for patch in (5, 8, 0):
        stem.patch = patch
        with pytest.raises(ValueError, match=f"patches of {patch} by {patch} pixels do not tile 24 by 12 pixels"):
            stem(x)
    with pytest.raises(ValueError, match=r"images are \(b, 3, H, W\), got \(2, 1, 24, 12\)"):
        stem(x[:, :1])


def test_flexivit_and_its_copy_of_a_vit():
    model = disturb(vit(24, 6, 16, 1, 2, hidden=20, classes=5))
    twin, x = flexible_copy(model), draw(0, 2, 3, 24, 24)
    assert torch.allclose(twin(x), model(x), atol=1e-5) and twin.stem.weight is not model.stem.cut.weight
    twin.stem.patch = 12
    large = F.interpolate(patchify(x, 6).reshape(-1, 3, 6, 6), (12, 12), mode="bilinear").view(2, 4, 4, 3, 12, 12)
    enlarged = large.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 48, 48)
    assert torch.allclose(twin(enlarged), model(x), atol=1e-4)
    with pytest.raises(ValueError, match="a PatchStem without a norm is wanted"):
        flexible_copy(twin)
    with pytest.raises(ValueError, match="a PatchStem without a norm is wanted"):
        flexible_copy(isotropic(PatchStem(4, 3, 8, nn.LayerNorm(8)), [], 8, 5))
    flexi = flexivit(8, 4, 16, 2, 2, hidden=20, classes=5, channels=1)
    assert flexi.stem.weight.shape == (16, 1, 8, 8) and flexi.stages[0].positions.table.shape == (4, 4, 16)
    assert len(flexi.stages[0].blocks) == 2 and flexi.stages[0].blocks[0].feed.part.up.out_features == 20
    assert flexi.norm.eps == flexi.stages[0].blocks[0].mix.norm.eps == 1e-6
    for patch, side in ((8, 32), (4, 32), (16, 32)):
        flexi.stem.patch = patch
        assert flexi.stem(draw(0, 1, 1, side, side)).shape == (1, side // patch, side // patch, 16)
    options = inspect.signature(flexivit).parameters
    usual = {"base": 32, "grid": 7, "width": 768, "depth": 12, "heads": 12, "hidden": None, "classes": 1000}
    assert {name: options[name].default for name in usual} == usual


# --- apt_patches


def shaded(seed, b=2, h=16, w=24):
    images = torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))
    images[:, :, : h // 2, : w // 2] = 0.4
    return images


@seeds
def test_entropy_counts_shades(seed):
    x = shaded(seed, 2, 8, 12)
    found = patch_entropy(x, 4, 16)
    gray = (x * torch.tensor([0.2989, 0.5870, 0.1140]).view(3, 1, 1)).sum(1)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                patch = (gray[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] * 16).long().flatten()
                share = torch.bincount(patch) / 16
                share = share[share > 0]
                assert math.isclose(found[b, i, j], -(share * share.log2()).sum(), abs_tol=1e-5)
    bits = lambda x, patch, **options: pytest.approx(patch_entropy(x, patch, **options).item(), abs=1e-5)
    ramp = torch.arange(16.0).view(1, 1, 4, 4) / 16
    assert bits(torch.full((1, 1, 4, 4), 1.0), 4) == 0 and bits(ramp, 4) == 4 and bits(ramp, 4, bins=4) == 2
    assert bits(torch.tensor([-5.0, 5.0, 0.0, 1.0]).view(1, 1, 2, 2), 2) == 1
    assert bits(torch.cat([torch.zeros(1, 1, 4, 4), 2 * ramp], 1), 4) == 4  # two channels: their mean
    assert bits(torch.arange(1024.0).view(1, 1, 32, 32) / 1024, 32) == 9  # 512 bins
    with pytest.raises(ValueError, match="patches of 3 pixels do not tile 8 by 12 pixels"):
        patch_entropy(x, 3)


@seeds
@pytest.mark.parametrize("thresholds", [[], [1.0], [3.0, 5.0], [5.0, 3.0, 4.0], [-math.inf] * 2, [math.inf] * 3])
def test_apt_patches_cover_the_image_exactly_once(seed, thresholds):
    x = shaded(seed, 2, 16, 32)
    kept = quadtree(x, 2, thresholds)
    assert [k.shape for k in kept] == [(2, 8 // 2**i, 16 // 2**i) for i in range(len(thresholds) + 1)]
    cover = sum(k.int().repeat_interleave(2**i, 1).repeat_interleave(2**i, 2) for i, k in enumerate(kept))
    assert (cover == 1).all()
    for i, threshold in enumerate(thresholds, 1):
        entropy = patch_entropy(x, 2 * 2**i)
        assert (entropy[kept[i]] < threshold).all()
        free = torch.ones_like(kept[i])
        for j in range(i + 1, len(kept)):
            free &= ~kept[j].repeat_interleave(2 ** (j - i), 1).repeat_interleave(2 ** (j - i), 2)
        assert torch.equal(kept[i], free & (entropy < threshold))
    if thresholds == [math.inf] * 3:
        assert kept[3].all() and not any(k.any() for k in kept[:3])


def apt(thresholds=(3.0, 5.0), pool=class_pooling):
    model = vit(16, 2, 16, 2, 2, hidden=20, classes=5)
    if pool is mean_pooling:
        model.pool, model.tokens = mean_pooling, None
    model = AdaptiveViT(model, partial(quadtree, patch=2, thresholds=thresholds), len(thresholds))
    return disturb(model)


@pytest.mark.parametrize("pool", [class_pooling, mean_pooling])
def test_apt_with_fine_patches_alone_is_its_vit(pool):
    model, x = apt((-math.inf, -math.inf), pool), shaded(0)
    tokens, owner, extra = model.tokens(x)
    assert extra == (pool is class_pooling)
    usual = model.model.stages[0].positions(model.model.stem(x)).flatten(1, 2)
    if pool is class_pooling:
        usual = torch.cat([model.model.tokens(2), usual], 1)
    assert torch.equal(tokens, usual.flatten(0, 1)) and torch.equal(
        owner, torch.arange(2).repeat_interleave(usual.shape[1])
    )
    assert torch.allclose(model(x), model.model(x), atol=1e-5)


def test_mean_pooling_of_adaptive_patches_leaves_extra_tokens_out():
    model = apt()
    model.model.pool = mean_pooling
    x = shaded(0)
    tokens, owner, extra = model.tokens(x)
    encoded = model.model.norm(run_packed(model.model.stages[0].blocks, tokens, owner))
    for i in range(2):
        assert torch.allclose(model(x)[i], model.model.head(encoded[owner == i][1:].mean(0)), atol=1e-5)


@seeds
def test_apt_packs_images_as_each_alone(seed):
    model = apt()
    x = torch.cat([shaded(seed), torch.full((1, 3, 16, 24), 0.3), shaded(seed + 1).flip(2)])
    alone = torch.cat([model(image[None]) for image in x])
    assert torch.allclose(model(x), alone, atol=1e-5)
    tokens, owner, _ = model.tokens(x)
    kept = quadtree(x, 2, (3.0, 5.0))
    counts = sum(k.flatten(1).sum(1) for k in kept) + 1
    assert torch.equal(owner.bincount(), counts) and counts[2] == 1 + 2 * 3
    assert not torch.allclose(model(x), model.model(x), atol=1e-3)
    places = model.model.stages[0].positions
    coarse = places(model.stem(x)[2])[kept[2]]
    assert torch.equal(tokens[owner == 2][1:], coarse[kept[2].nonzero()[:, 0] == 2])


@seeds
def test_packed_blocks_are_the_blocks_on_each_image(seed):
    block = disturb(Block(MultiHeadAttention(8, 2), FeedForward(8), partial(nn.LayerNorm, 8)), seed)
    owner = torch.arange(4).repeat_interleave(torch.tensor([3, 7, 1, 4]))
    x = draw(seed, 15, 8)
    found = run_packed([block, block], x, owner)
    first, mean = pool_owned(x, owner, 4, 1)
    for i in range(4):
        assert torch.allclose(found[owner == i], block(block(x[owner == i][None]))[0], atol=1e-5)
        assert torch.equal(first[i], x[owner == i][0])
        if i != 2:
            assert torch.allclose(mean[i], x[owner == i][1:].mean(0), atol=1e-5)
    narrow = pool_owned(draw(seed, 3000, 8).bfloat16() + 1, torch.zeros(3000, dtype=torch.long), 1, 0)[1]
    assert narrow.dtype == torch.bfloat16 and torch.allclose(narrow.float(), torch.ones(1, 8), atol=0.1)


def test_a_coarse_token_is_the_shrunk_patch_and_its_gathered_pieces():
    stem, x = AdaptiveStem(PatchStem(2, 3, 8), 2), shaded(0)
    for i in (1, 2):
        assert torch.equal(stem(x)[i], stem.stem(F.avg_pool2d(x, 2**i)))
    disturb(stem)
    fine = stem(x)[0]
    assert torch.equal(fine, stem.stem(x))
    for i in (1, 2):
        assert stem.gather[i - 1].weight.shape[2:] == (2**i, 2**i)
        pieces = patchify(fine.movedim(-1, 1), 2**i) @ stem.gather[i - 1].weight.flatten(1).T + stem.gather[i - 1].bias
        expected = stem.stem(F.avg_pool2d(x, 2**i)) + stem.write[i - 1](pieces)
        assert torch.allclose(stem(x)[i], expected, atol=1e-4)


def test_tokens_are_spread_over_what_they_cover():
    kept = quadtree(shaded(0), 2, [3.0, 5.0])
    maps = [draw(i, 2, 8 // 2**i, 12 // 2**i, 3) for i in range(3)]
    found = spread_tokens(maps, kept)
    for i in range(3):
        for b, y, x in kept[i].nonzero().tolist():
            block = found[b, y * 2**i : (y + 1) * 2**i, x * 2**i : (x + 1) * 2**i]
            assert torch.equal(block, maps[i][b, y, x].expand(2**i, 2**i, 3))


def test_adaptive_vit_refuses_other_models():
    choose = partial(quadtree, patch=4, thresholds=[1.0])
    with pytest.raises(
        ValueError, match=r"a PatchStem and one TokenStage are wanted, not \['FlexiStem', 'TokenStage'\]"
    ):
        AdaptiveViT(flexivit(4, 4, 16, 1, 2), choose)
    odd = vit(16, 4, 16, 1, 2)
    odd.pool = AttentionPooling(16, 2)
    with pytest.raises(ValueError, match="the pool must be of class or mean"):
        AdaptiveViT(odd, choose)
    with pytest.raises(ValueError, match=r"masks \[.*\] do not fit maps"):
        AdaptiveViT(vit(16, 4, 16, 1, 2), choose, 2)(shaded(0, 2, 16, 16))
    model = apt()
    assert model(shaded(0)[:0]).shape == (0, 5)


# --- resformer


@pytest.mark.parametrize("h, w", [(3, 5), (4, 2), (1, 6)])
def test_normalized_waves_by_hand(h, w):
    waves = normalized_waves(h, w, 8)
    for i in range(h):
        for j in range(w):
            for half, place in ((0, (i + 1) / h), (4, (j + 1) / w)):
                for k in range(2):
                    angle = 2 * math.pi * place * 10000.0 ** (-2 * k / 4)
                    assert math.isclose(waves[i, j, half + 2 * k], math.sin(angle), abs_tol=1e-5)
                    assert math.isclose(waves[i, j, half + 2 * k + 1], math.cos(angle), abs_tol=1e-5)
    assert torch.allclose(normalized_waves(2 * h, 2 * w, 8)[1::2, 1::2], waves, atol=1e-6)
    with pytest.raises(ValueError, match="4 must divide 6"):
        normalized_waves(h, w, 6)


def test_normalized_waves_are_convolved_and_added():
    layer, x = disturb(NormalizedWaves(8)), draw(0, 2, 3, 5, 8)
    code = normalized_waves(3, 5, 8).permute(2, 0, 1)[None]
    expected = x + F.conv2d(code, layer.look.weight, layer.look.bias, padding=1, groups=8).permute(0, 2, 3, 1)
    assert torch.allclose(layer(x), expected, atol=1e-6) and layer.look.weight.shape == (8, 1, 3, 3)


@seeds
def test_resformer_local_part_starts_at_zero_and_looks_at_neighbors(seed):
    layer, x = LocalValueAttention(8, 2), draw(seed, 2, 2 + 12, 8)
    plain = MultiHeadAttention(8, 2)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(layer(x, (3, 4)), plain(x)) and not layer.local.bias.any()
    disturb(layer, seed)
    q, k, v = layer.project(x)
    found = F.scaled_dot_product_attention(q, k, v)
    for h in range(2):
        values = v[:, h, 2:].unflatten(1, (3, 4)).permute(0, 3, 1, 2)
        near = F.conv2d(values, layer.local.weight, layer.local.bias, padding=1, groups=4)
        found[:, h, 2:] += near.permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(layer(x, (3, 4)), layer.to_out(found.transpose(1, 2).flatten(2)), atol=1e-5)
    with pytest.raises(ValueError, match="14 tokens cannot fill a grid of 3 by 5"):
        layer(x, (3, 5))


def test_a_gridded_stage_tells_its_blocks_the_grid():
    class Seen(nn.Module):
        def forward(self, row, grid):
            self.seen = row, grid
            return row * 2

    block, x, tokens = Seen(), draw(0, 2, 3, 4, 8), draw(1, 2, 1, 8)
    places = LearnedGrid(3, 4, 8)
    y, out = GriddedStage([block, block], positions=places)(x, tokens)
    assert block.seen[1] == (3, 4) and torch.equal(block.seen[0], 2 * torch.cat([tokens, places(x).flatten(1, 2)], 1))
    assert torch.equal(y, 4 * places(x)) and torch.equal(out, 4 * tokens)
    y, none = GriddedStage([])(x)
    assert torch.equal(y, x) and none is None


def test_total_of_the_released_tiny_resformer():
    model = resformer_tiny(classes=7)
    assert measure.parameters(model) == 5_689_192 - 993 * 193 and model.head.out_features == 7
    assert len(model.stages[0].blocks) == 12
    assert {m.heads for m in model.modules() if isinstance(m, MultiHeadAttention)} == {3}


@pytest.mark.parametrize("make, size", [(resformer_small, (16, 384, 12, 6)), (resformer_base, (16, 768, 12, 12))])
def test_sizes_of_the_larger_resformers(monkeypatch, make, size):
    """They are `resformer` with these numbers; the notebook counts their weights."""
    monkeypatch.setattr(any_resolution, "resformer", lambda *args, **options: (args, options))
    unchecked = inspect.unwrap(make)
    assert unchecked() == (size, {"classes": 1000}) and unchecked(classes=7) == (size, {"classes": 7})


def test_resformer_gives_the_scores_of_the_released_code():
    model = resformer(8, 16, 2, 2, classes=5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(((torch.arange(p.numel()) + p.shape[0]).double().sin() * 0.2).view_as(p))
        wave = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).sin().view(2, 3, 32, 32)
        found = model.double().eval()(wave).float()
    theirs = [
        [-0.19691619, 0.03354462, -0.03475396, 0.42667663, -0.18965957],
        [-0.19691597, 0.03354752, -0.03475975, 0.42668480, -0.18966940],
    ]
    assert torch.allclose(found, torch.tensor(theirs), atol=2e-6)
    assert resformer(8, 16, 1, 2, hidden=20, classes=5, channels=1)(draw(0, 1, 1, 8, 24)).shape == (1, 5)
    assert resformer(8, 16, 1, 2, hidden=20).stages[0].blocks[0].feed.part.up.out_features == 20
    assert model.norm.eps == model.stages[0].blocks[1].feed.norm.eps == 1e-6


def test_filters_of_the_last_block_need_the_places_to_be_read():
    model, x = disturb(resformer(8, 16, 2, 2, classes=5)), draw(0, 2, 3, 16, 24)
    model(x).sum().backward()
    first, last = (block.mix.part.local.weight.grad for block in model.stages[0].blocks)
    assert first.abs().max() > 0 and (last is None or not last.any())


@seeds
def test_scale_consistency_teaches_the_smaller_copy(seed):
    a, b, c = (draw(seed + i, 4, 6).requires_grad_() for i in range(3))
    normed = lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = F.smooth_l1_loss(b, normed(a)) + F.smooth_l1_loss(c, normed(b))
    found = scale_consistency([a, b, c])
    assert torch.allclose(found, expected, atol=1e-5)
    found.backward()
    assert a.grad is None and torch.allclose(c.grad, torch.autograd.grad(F.smooth_l1_loss(c, normed(b).detach()), c)[0])
    assert scale_consistency([a]) == 0


# --- mspe


@seeds
def test_mspe_with_one_kernel_is_the_resize_of_flexivit(seed):
    w, bias, x = draw(seed, 8, 3, 4, 4), draw(seed, 8), draw(seed, 2, 3, 12, 24)
    stem = MultiScaleStem(w, bias, (2, 3), [4])
    expected = F.conv2d(x, pi_resize(w, 6, 8), bias, (6, 8)).permute(0, 2, 3, 1)
    assert torch.allclose(stem(x), expected, atol=1e-5) and stem(x).shape == (2, 2, 3, 8)


def test_mspe_takes_the_kernel_of_nearest_area():
    w, bias = draw(0, 8, 3, 4, 4), draw(1, 8)
    stem = disturb(MultiScaleStem(w, bias, (2, 2), [2, 4, 8]))
    for side, chosen in ((2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2), (16, 2)):
        x = draw(0, 1, 3, 2 * side, 2 * side)
        expected = F.conv2d(x, pi_resize(stem.kernels[chosen], side, side), stem.bias, side)
        assert torch.allclose(stem(x), expected.movedim(1, -1), atol=1e-4), side
    wide = draw(0, 1, 3, 2, 16)  # patches of 1 by 8 have the area of 8, between 4 and 16: nearer to neither
    assert stem(wide).shape == (1, 2, 2, 8)
    with pytest.raises(ValueError, match="at least one size"):
        MultiScaleStem(w, bias, (2, 2), [])
    with pytest.raises(ValueError, match="do not tile 5 by 4 pixels"):
        stem(draw(0, 1, 3, 5, 4))
    with pytest.raises(ValueError, match="do not tile 1 by 4 pixels"):
        stem(draw(0, 1, 3, 1, 4))
    four = MultiScaleStem(w, bias, (4, 4), [4])
    with pytest.raises(ValueError, match=r"a grid of \(4, 4\) does not divide images of \(6, 8\) pixels"):
        four(draw(0, 1, 3, 6, 8))


def test_mspe_trains_the_patch_embedding_alone():
    model = disturb(vit(16, 4, 16, 1, 2, hidden=20, classes=5))
    old = model.stem.cut.weight
    x, scores = draw(0, 2, 3, 16, 16), model(draw(0, 2, 3, 16, 16))
    tuned = multi_scale_(model, [4, 8])
    assert tuned is model and torch.allclose(tuned(x), scores, atol=1e-5)
    assert torch.equal(tuned.stem.kernels[0], old) and tuned.stem.kernels[0] is not old
    for side, chosen in ((16, 0), (32, 1)):
        model.zero_grad()
        tuned(draw(0, 2, 3, side, side)).sum().backward()
        assert {n for n, p in tuned.named_parameters() if p.grad is not None} == {f"stem.kernels.{chosen}", "stem.bias"}
    with pytest.raises(ValueError, match="a PatchStem and a LearnedGrid are wanted, not MultiScaleStem"):
        multi_scale_(model, [4])
    with pytest.raises(ValueError, match="not PatchStem and Identity"):
        multi_scale_(isotropic(PatchStem(4, 3, 8), [], 8, 5), [4])


# --- elastic_sampling


def elastic(seed=0):
    block = Block(MultiHeadAttention(16, 2), FeedForward(16), partial(nn.LayerNorm, 16))
    return disturb(ElasticViT(nn.Linear(48, 16), [block], nn.LayerNorm(16), nn.Linear(16, 5), 4.0), seed)


@seeds
def test_elastic_sampling_reads_a_set(seed):
    model, crops = elastic(), draw(seed, 2, 7, 3, 4, 4)
    boxes = random_boxes((2, 7), (16, 24), (2, 10), torch.Generator().manual_seed(seed))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(model(crops[:, order], boxes[:, order]), model(crops, boxes), atol=1e-5)
    assert not torch.allclose(model(crops[:, order], boxes), model(crops, boxes), atol=1e-3)
    x = model.embed(crops.flatten(2)) + corner_waves(boxes, 16, 4.0)
    row = torch.cat([model.tokens.value.expand(2, 1, 16), x], 1)
    assert torch.allclose(model(crops, boxes), model.head(model.stack(row)[:, 0]), atol=1e-6)
    with pytest.raises(ValueError, match="crops have 75 numbers, the embedding reads 48"):
        model(draw(0, 2, 7, 3, 5, 5), boxes)


@seeds
def test_crops_on_the_grid_are_patches(seed):
    x = draw(seed, 2, 3, 8, 12)
    boxes = grid_boxes(8, 12, 4)
    assert torch.equal(boxes[:4, :2], torch.tensor([[0.0, 0], [0, 4], [0, 8], [4, 0]])) and boxes[5].tolist() == [
        4,
        8,
        8,
        12,
    ]
    crops = crop_boxes(x, boxes.expand(2, -1, -1), 4)
    assert torch.allclose(crops.flatten(2), patchify(x, 4).flatten(1, 2), atol=1e-5)
    ramp = torch.arange(12.0).expand(1, 1, 8, 12)
    box = torch.tensor([[[1.0, 2.0, 5.0, 8.0]]])
    assert torch.allclose(crop_boxes(ramp, box, 3)[0, 0, 0], torch.tensor([2.5, 4.5, 6.5]).expand(3, 3), atol=1e-5)
    assert torch.allclose(crop_boxes(ramp.mT, box, 2)[0, 0, 0], torch.tensor([[1.5], [3.5]]).expand(2, 2), atol=1e-5)
    outside = torch.tensor([[[-8.0, -8.0, -4.0, -4.0]]])
    assert torch.allclose(crop_boxes(ramp + 1, outside, 2), torch.ones(1, 1, 1, 2, 2), atol=1e-5)
    with pytest.raises(ValueError, match="a crop of 0 by 0 pixels has no pixel"):
        crop_boxes(x, boxes.expand(2, -1, -1), 0)
    for patch in (5, 0):
        with pytest.raises(ValueError, match=f"patches of {patch} pixels do not tile 8 by 12"):
            grid_boxes(8, 12, patch)


def test_corner_waves_by_hand():
    boxes = torch.tensor([[1.0, 2.0, 5.0, 10.0]])
    waves = corner_waves(boxes, 16, 2.0)[0]
    for part, place in enumerate([0.5, 1.0, 2.5, 5.0]):
        for k in range(2):
            angle = place * 10000.0 ** (-k / 2)
            assert math.isclose(waves[4 * part + 2 * k], math.sin(angle), abs_tol=1e-5)
            assert math.isclose(waves[4 * part + 2 * k + 1], math.cos(angle), abs_tol=1e-5)
    with pytest.raises(ValueError, match="8 must divide 12"):
        corner_waves(boxes, 12, 2.0)


@seeds
def test_random_boxes_are_squares_inside(seed):
    boxes = random_boxes((50, 20), (16, 24), (3, 9), torch.Generator().manual_seed(seed))
    top, left, bottom, right = boxes.unbind(-1)
    assert boxes.shape == (50, 20, 4) and torch.allclose(bottom - top, right - left, atol=1e-5)
    side = bottom - top
    assert 2.99 < side.min() < 3.2 and 8.8 < side.max() < 9.01 and abs(side.mean() - 6) < 0.2
    assert top.min() >= 0 and left.min() >= 0 and bottom.max() <= 16.001 and right.max() <= 24.001
    assert abs(((top + bottom) / 2).mean() - 8) < 0.3 and abs(((left + right) / 2).mean() - 12) < 0.5
    assert top.max() > 10 and left.max() > 16
    for sides in ((0, 3), (5, 4), (3, 17)):
        with pytest.raises(ValueError, match=f"squares of {sides[0]} to {sides[1]} pixels do not fit"):
            random_boxes((2,), (16, 24), sides)


def test_patch_mix_shares_labels_as_patches():
    crops, boxes, labels = draw(0, 4, 5, 3, 2, 2), draw(1, 4, 5, 4), F.one_hot(torch.arange(4)).float()
    for keep in (0, 2, 5):
        x, where, target = patch_mix(crops, boxes, labels, keep)
        for i in range(4):
            assert torch.equal(x[i], torch.cat([crops[i, :keep], crops[3 - i, keep:]]))
            assert torch.equal(where[i], torch.cat([boxes[i, :keep], boxes[3 - i, keep:]]))
            assert torch.allclose(target[i], keep / 5 * labels[i] + (1 - keep / 5) * labels[3 - i])
    for keep in (-1, 6):
        with pytest.raises(ValueError, match=f"of 5 patches one cannot keep {keep}"):
            patch_mix(crops, boxes, labels, keep)


# --- what an engineer takes for granted


@pytest.mark.parametrize("name", examples)
def test_examples_pickle_and_copy(name):
    torch.manual_seed(0)
    model, inputs = examples[name]()
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        assert torch.equal(pickle.loads(pickle.dumps(model))(*inputs), expected)
        assert torch.equal(copy.deepcopy(model)(*inputs), expected)
        again = examples[name]()[0].eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(*inputs), expected)

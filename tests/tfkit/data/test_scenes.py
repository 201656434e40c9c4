"""Scenes: masks, boxes and classes agree to the pixel; the geometry fulfils its equations."""

import pytest
import torch
from scipy import ndimage

from tfkit import data as D
from tfkit.data.scenes import _object


def test_masks_boxes_and_classes_agree():
    s = D.scenes(60, size=64, objects=5)
    assert s.images.shape == (60, 3, 64, 64) and 0 <= s.images.min() and s.images.max() <= 1
    background, kinds = D.patches(60, 64), set()
    for b in range(60):
        count = int((s.classes[b] >= 0).sum())
        assert 1 <= count <= 5 and s.classes[b, count:].eq(-1).all() and s.boxes[b, count:].eq(0).all()
        assert s.instances[b].unique().tolist() == list(range(count + 1))
        for k in range(count):
            mask = s.instances[b] == k + 1
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert s.boxes[b, k].tolist() == [float(v) for v in box]
            assert s.labels[b][mask].unique().tolist() == [int(s.classes[b, k]) + 1]
            assert mask.sum() > 20
            color = s.images[b][:, mask]
            assert (
                (color.std(1).max() > 0.02)
                if s.classes[b, k] == 10
                else torch.equal(color[:, :1], color.mean(1)[:, None]) or color.std(1).max() < 1e-6
            )
            kinds.add(int(s.classes[b, k]))
        empty = s.instances[b] == 0
        assert torch.equal(s.labels[b] == 0, empty)
        assert torch.equal(s.images[b][:, empty], background[b][:, empty])  # else the photograph is as it was
    assert kinds == set(range(11))


def test_scenes_are_seeded_and_parts_differ():
    a, b, c = D.scenes(5), D.scenes(5), D.scenes(5, part="test")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a.images, c.images)
    rng = torch.Generator()
    for kind in (3, 10):  # no digit and no coin of the training part appears in the test part
        looks = []
        for test in (False, True):
            rng.manual_seed(0)
            drawn = [_object(kind, 32, test, rng) for _ in range(120)]
            looks.append({(x[1] if kind == 3 else x[0]).numpy().tobytes() for x in drawn})
        assert len(looks[0]) > 15 and len(looks[1]) > 4 and not looks[0] & looks[1]


def test_coins_are_where_the_table_says():
    """Bright discs on a dark ground: the coins, cut out by the table, leave next to nothing bright behind."""
    coins = D.picture("coins")[0]
    assert len(D.COINS) == 24
    y, x = torch.meshgrid(torch.arange(303), torch.arange(384), indexing="ij")
    inside = torch.zeros(303, 384, dtype=torch.bool)
    for row, column, radius in D.COINS.tolist():
        disc = (y - row) ** 2 + (x - column) ** 2 <= radius**2
        assert not (inside & disc).any()  # they do not touch
        inside |= disc
    bright = coins > 0.62
    assert (bright & inside).sum() / bright.sum() > 0.92
    wide = torch.from_numpy(ndimage.binary_dilation(inside.numpy(), iterations=2))
    assert coins[inside].mean() > coins[~wide].mean() + 0.2


def test_stereo_disparity_finds_the_same_point():
    pair = D.stereo()
    assert pair.left.shape == pair.right.shape == (3, 500, 741) and pair.disparity.shape == (500, 741)
    x = torch.arange(741) - pair.disparity
    known = ~x.isnan() & (x > 0)
    x = x.nan_to_num(0).round().long().clamp(0)
    error = lambda columns: (pair.left - pair.right.gather(2, columns.expand(3, -1, -1))).abs().mean(0)[known].mean()
    assert error(x) < 0.04 < 0.15 < error(torch.arange(741).expand_as(x))
    assert 0.05 < pair.disparity.isnan().float().mean() < 0.1
    depth = pair.depth()  # a motorcycle in a workshop: two to five meters
    assert 2000 < depth.nan_to_num(3000).min() and depth.nan_to_num(3000).max() < 5100
    half = D.stereo(2)
    assert half.left.shape == (3, 250, 370)
    assert torch.allclose(half.depth().nanmean(), depth.nanmean(), rtol=0.02)  # depth does not depend on the resolution


@pytest.mark.parametrize("seed", range(3))
def test_two_views_fulfil_the_epipolar_constraint(seed):
    views = D.two_views(6, 20, seed=seed)
    lift = lambda x: torch.cat([x, torch.ones_like(x[..., :1])], -1)
    residual = torch.einsum("bni,bij,bnj->bn", lift(views.second), views.essential(), lift(views.first))
    assert residual.abs().max() < 1e-14
    assert torch.allclose(views.rotation @ views.rotation.mT, torch.eye(3, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(torch.linalg.det(views.rotation), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(torch.linalg.svdvals(views.essential()), torch.tensor([1.0, 1, 0]).double(), atol=1e-12)
    # eight points give the matrix back: the null vector of the equations
    rows = torch.einsum("bni,bnj->bnij", lift(views.second), lift(views.first)).flatten(2)
    found = torch.linalg.svd(rows).Vh[:, -1].view(6, 3, 3)
    truth = views.essential() / views.essential().flatten(1).norm(dim=1)[:, None, None]
    assert ((found * truth).sum((1, 2)).abs() - 1).abs().max() < 1e-6
    moved = views.points @ views.rotation.mT + views.translation.unsqueeze(1)
    assert views.points[..., 2].min() >= 4 and moved[..., 2].min() > 0  # before both cameras
    assert torch.allclose(D.project(moved), views.second)
    wrong = torch.einsum("bni,bij,bnj->bn", lift(views.second), views.essential().mT, lift(views.first))
    assert wrong.abs().mean() > 1e-3  # the transposed matrix is not the same constraint


def test_noise_in_two_views():
    clean, noisy = D.two_views(4, 500), D.two_views(4, 500, noise=0.01)
    assert torch.equal(clean.points, noisy.points)
    assert abs(float((noisy.first - clean.first).std()) - 0.01) < 0.001


def test_mri_and_heights():
    head = D.mri()
    assert head.shape == (1, 256, 256) and head.min() == 0 and 0.5 < head.max() <= 1
    assert head[0, 100:150, 100:150].mean() > head[0, :20, :20].mean() + 0.2  # brain and air
    land = D.heights()
    assert land.shape == (344, 403) and (land.min(), land.max()) == (236, 1076)
    sea = D.heights("topobathy")
    assert sea.shape == (91, 120) and (sea.min(), sea.max()) == (-1437, 2205)

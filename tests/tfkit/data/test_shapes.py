"""Shapes: closed forms against meshes, slopes and brute force."""

import math

import pytest
import torch

from tfkit import data as D

SOLIDS = [
    D.Solid("sphere", (0.8,)), D.Solid("box", (0.5, 0.8, 0.3)), D.Solid("cylinder", (0.5, 0.7)),
    D.Solid("torus", (0.7, 0.25)),
]  # fmt: skip
name = lambda solid: solid.kind


@pytest.mark.parametrize("solid", SOLIDS, ids=name)
def test_the_signed_distance_has_slope_one(solid):
    x = (torch.rand(4000, 3, dtype=torch.float64) * 3 - 1.5).requires_grad_()
    (slope,) = torch.autograd.grad(solid.sdf(x).sum(), x)
    assert (slope.norm(dim=1) - 1).abs().max() < 1e-9


@pytest.mark.parametrize("solid", SOLIDS, ids=name)
def test_the_signed_distance_is_the_distance(solid):
    """Against the nearest of many surface points, and its sign against the volume by counting."""
    surface = solid.sample(20_000).double()
    assert solid.sdf(surface).abs().max() < 1e-5
    x = torch.rand(300, 3, dtype=torch.float64) * 3 - 1.5
    nearest = torch.cdist(x, surface).amin(1)
    assert (solid.sdf(x).abs() - nearest).abs().max() < 0.05 and (nearest >= solid.sdf(x).abs() - 1e-6).all()
    inside = (solid.sdf(torch.rand(400_000, 3) * 3 - 1.5) < 0).float().mean() * 27
    assert abs(float(inside) / solid.measures()[0] - 1) < 0.03


@pytest.mark.parametrize("solid", SOLIDS, ids=name)
def test_the_mesh_has_the_measures(solid):
    volume, area, euler = solid.measures()
    coarse, fine = solid.mesh(20), solid.mesh(48)
    assert coarse.euler() == fine.euler() == euler
    edges = torch.cat([fine.faces[:, [i, j]] for i, j in ((0, 1), (1, 2), (2, 0))])
    assert len(edges.unique(dim=0)) == len(edges)  # each edge once in each direction: closed, one orientation
    assert torch.equal(edges.unique(dim=0), edges.flip(1).unique(dim=0))
    assert solid.sdf(fine.vertices).abs().max() < 1e-6
    for truth, found in (
        (volume, [m.volume() for m in (coarse, fine)]),
        (area, [m.areas().sum() for m in (coarse, fine)]),
    ):
        errors = [abs(float(value) / truth - 1) for value in found]
        assert errors[1] < 0.04 and errors[1] < errors[0]


def test_measures_by_hand():
    assert SOLIDS[1].measures() == pytest.approx((1 * 1.6 * 0.6, 2 * (1.6 + 0.6 + 0.96), 2))  # sides 1, 1.6 and 0.6
    assert D.Solid("sphere", (1.0,)).measures() == pytest.approx((4.18879, 12.56637, 2))
    assert D.Solid("cylinder", (1.0, 0.5)).measures() == pytest.approx((math.pi, 4 * math.pi, 2))  # height 1
    assert SOLIDS[3].measures() == pytest.approx((math.pi * 0.0625 * 1.4 * math.pi, 0.5 * math.pi * 1.4 * math.pi, 0))


def test_sampling_is_uniform():
    """The upper half of a sphere, and each face of a box, get points by their area; the same seed, the same points."""
    sphere = SOLIDS[0].sample(20_000)
    assert abs(float((sphere[:, 2] > 0.4).float().mean()) - 0.25) < 0.015  # a cap's area is linear in its height
    box = SOLIDS[1].sample(20_000)
    top = (box[:, 2].abs() > 0.2999).float().mean()
    assert abs(float(top) - 3.2 / 6.32) < 0.03
    assert torch.equal(SOLIDS[3].sample(9), SOLIDS[3].sample(9)) and SOLIDS[3].sample(9).dtype == torch.float32


def test_clouds():
    c = D.clouds(24, points=64, noise=0.0)
    assert c.x.shape == (24, 64, 3) and c.y.unique().tolist() == [0, 1, 2, 3]
    assert torch.allclose(c.x.norm(dim=2).amax(1), torch.ones(24))
    spheres = c.x[c.y == 0]
    assert spheres.norm(dim=2).min() > 0.99
    again, noisy = D.clouds(24, points=64, noise=0.0), D.clouds(24, points=64, noise=0.02)
    assert torch.equal(c.x, again.x) and not torch.equal(c.x, D.clouds(24, 64, 0.0, seed=1).x)
    assert abs(float((noisy.x - c.x)[:1].std()) - 0.02) < 0.005


def test_solids_are_plain_values():
    import copy
    import pickle

    for solid in SOLIDS:
        assert pickle.loads(pickle.dumps(solid)) == copy.deepcopy(solid) == solid

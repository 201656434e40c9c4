"""Restoration: what was done to an image is exactly what is said, and can be undone where it can."""

import math

import pytest
import torch
import torch.nn.functional as F

from tfkit import data as D


@pytest.mark.parametrize("kind", D.DAMAGES)
def test_pairs(kind):
    pair, again, other = D.restoration(kind, 12), D.restoration(kind, 12), D.restoration(kind, 12, seed=1)
    assert pair.clean.shape == (12, 3, 32, 32) and torch.equal(pair.clean, D.patches(12, 32))
    assert all(torch.equal(a, b) for a, b in zip(pair, again, strict=True))
    assert not torch.equal(pair.damaged, other.damaged)
    assert not torch.equal(pair.clean, D.restoration(kind, 12, part="test").clean)
    assert pair.damaged.shape[:2] == (12, 3) and pair.damaged.isfinite().all()
    if kind != "small":
        assert (pair.damaged - pair.clean).abs().mean() > 0.005


def test_the_cause_explains_the_damage():
    get = lambda kind: D.restoration(kind, 6)
    clean, damaged, noise = get("noise")
    assert torch.allclose(damaged - noise, clean, atol=1e-6) and abs(float(noise.std()) - 0.1) < 0.003
    clean, damaged, light = get("rain")
    assert torch.equal(damaged, (clean + light).clamp(max=1)) and 0 < (light > 0.1).float().mean() < 0.5
    clean, damaged, gain = get("dark")
    assert torch.allclose((damaged / gain).sqrt(), clean, atol=1e-5)
    clean, damaged, mask = get("holes")
    assert torch.equal(damaged[mask.expand_as(clean)], clean[mask.expand_as(clean)])
    assert damaged[~mask.expand_as(clean)].abs().max() == 0
    clean, damaged, factor = get("small")
    assert factor == 2 and damaged.shape == (6, 3, 16, 16) and torch.allclose(damaged.mean(), clean.mean(), atol=1e-6)
    for kind in ("blur", "motion"):
        clean, damaged, kernel = get(kind)
        assert kernel.shape == (9, 9) and torch.allclose(damaged, D.blur(clean, kernel))


def test_blur_is_a_convolution():
    """A single bright pixel becomes the kernel itself, not its mirror image; constants stay."""
    kernel = torch.rand(5, 5)
    point = torch.zeros(1, 2, 11, 11)
    point[:, :, 5, 5] = 1
    assert torch.allclose(D.blur(point, kernel)[0, 1, 3:8, 3:8], kernel)
    assert torch.allclose(D.blur(torch.full((1, 3, 8, 8), 0.3), D.gaussian_kernel(5)), torch.tensor(0.3))
    x = torch.rand(2, 3, 16, 16)
    twice = D.blur(D.blur(x, D.gaussian_kernel(9, 1.0)), D.gaussian_kernel(9, 1.0))  # variances add
    assert torch.allclose(twice[..., 8, 8], D.blur(x, D.gaussian_kernel(15, math.sqrt(2)))[..., 8, 8], atol=2e-3)


@pytest.mark.parametrize("kernel", [D.gaussian_kernel(9, 2.0), D.motion_kernel(9, 0.0), D.motion_kernel(7, 1.1)])
def test_kernels(kernel):
    assert torch.allclose(kernel.sum(), torch.tensor(1.0)) and kernel.min() >= 0
    assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-6)  # around the middle


def test_the_stroke_has_its_direction():
    flat, steep = D.motion_kernel(9, 0.0), D.motion_kernel(9, math.pi / 2)
    assert torch.allclose(flat[4].sum(), torch.tensor(1.0)) and torch.allclose(steep[:, 4].sum(), torch.tensor(1.0))
    diagonal = D.motion_kernel(9, math.pi / 4)  # up to the right: rows fall as columns rise
    assert diagonal[2, 6] > 0.05 and diagonal[2, 2] == 0


def test_holes():
    mask = D.holes(200, 32, missing=0.3, pieces=3)
    missing = 1 - mask.float().mean((1, 2, 3))
    assert mask.dtype == torch.bool and missing.max() <= 0.3 and missing.mean() > 0.2
    single = ~D.holes(50, 40, missing=0.2, pieces=1)[:, 0]
    h, w = single.any(2).sum(1), single.any(1).sum(1)
    assert torch.equal(h * w, single.sum((1, 2)))  # a rectangle
    assert (h * w).min() > 0.2 * 1600 * 0.85 and (h / w).max() < 2.3 and (h / w).min() > 1 / 2.3


def test_a_stronger_damage_is_stronger():
    for kind in ("blur", "noise", "rain", "dark", "holes"):
        loss = [F.mse_loss(*D.restoration(kind, 20, strength=s)[:2]) for s in (0.5, 1.0, 2.0)]
        assert loss[0] < loss[1] < loss[2], kind

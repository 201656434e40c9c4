"""Video: what moves, moves as it is said."""

import torch

from tfkit import data as D


def test_moving_digits_are_where_they_are_said_to_be():
    v = D.moving_digits(20, frames=30, size=32, digits=1, speed=3)
    assert v.frames.shape == (20, 30, 1, 32, 32) and v.labels.shape == (20, 1) and v.corners.shape == (20, 1, 30, 2)
    for b in range(20):
        sprite = None
        for t in range(30):
            y, x = v.corners[b, 0, t].tolist()
            here = v.frames[b, t, 0, y : y + 8, x : x + 8]
            sprite = here if sprite is None else sprite
            assert torch.equal(here, sprite)
            assert torch.isclose(v.frames[b, t].sum(), here.sum(), rtol=1e-5)  # nothing elsewhere
    step = v.corners.diff(dim=2)
    assert 0 <= v.corners.min() and v.corners.max() <= 24 and step.abs().max() <= 3
    inner = (v.corners[:, :, 1:-1] > 3) & (v.corners[:, :, 1:-1] < 21)
    assert (step[:, :, 1:] == step[:, :, :-1])[inner].all()  # straight on, away from the walls
    turned = (step[:, :, 1:] * step[:, :, :-1] < 0).any(2)
    assert turned.any(1).float().mean() > 0.5 and step.abs().sum((2, 3)).min() > 0  # it bounces, and none stands still


def test_moving_digits_overlap_by_the_brighter():
    v = D.moving_digits(50, frames=6, size=16, digits=2, speed=2)
    assert v.frames.max() == 1 and v.frames.min() == 0
    for b in range(50):
        parts = torch.zeros(2, 16, 16)
        y, x = v.corners[b, :, 0].T.tolist()
        for k in range(2):
            parts[k, y[k] : y[k] + 8, x[k] : x[k] + 8] = v.frames[b, 0, 0, y[k] : y[k] + 8, x[k] : x[k] + 8]
        assert torch.equal(parts.amax(0), v.frames[b, 0, 0])
    assert torch.equal(v.frames, D.moving_digits(50, 6, 16, 2, 2).frames)
    assert not torch.equal(v.frames, D.moving_digits(50, 6, 16, 2, 2, seed=1).frames)


def test_velocities_cover_the_square_without_its_middle():
    first = D.moving_digits(2000, frames=2, size=64, digits=1, speed=1).corners
    away = ((first[:, 0, 0] > 0) & (first[:, 0, 0] < 56)).all(1)
    seen = {tuple(v) for v in (first[:, 0, 1] - first[:, 0, 0])[away].tolist()}
    assert seen == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)} - {(0, 0)}


def test_larger_digits_are_the_same_digits():
    small, large = D.moving_digits(4, 1, 32, 1, 1), D.moving_digits(4, 1, 32, 1, 1, scale=2)
    for b in range(4):
        (y, x), (Y, X) = small.corners[b, 0, 0].tolist(), large.corners[b, 0, 0].tolist()
        twice = large.frames[b, 0, 0, Y : Y + 16, X : X + 16]
        assert torch.equal(twice[::2, ::2], small.frames[b, 0, 0, y : y + 8, x : x + 8])
        assert torch.equal(twice[::2], twice[1::2]) and torch.equal(twice[:, ::2], twice[:, 1::2])


def test_pan_is_motion_to_the_pixel():
    for part in ("train", "test"):
        v = D.pan(30, frames=6, size=24, speed=3, part=part)
        assert v.frames.shape == (30, 6, 3, 24, 24) and v.velocity.abs().max() == 3
        for frames, (dy, dx) in zip(v.frames, v.velocity.tolist(), strict=True):
            y, x = slice(max(0, -dy), 24 - max(0, dy)), slice(max(0, -dx), 24 - max(0, dx))
            ahead = frames[:-1, :, y.start + dy : y.stop + dy, x.start + dx : x.stop + dx]
            assert torch.equal(frames[1:, :, y, x], ahead)
    assert torch.equal(v.frames, D.pan(30, 6, 24, 3, "test").frames)
    assert not torch.equal(v.frames, D.pan(30, 6, 24, 3).frames)

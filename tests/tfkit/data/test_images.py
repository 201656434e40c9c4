"""Pictures: documented shapes and ranges, no pixel in two parts, sets that tell methods apart."""

import pytest
import torch
import torch.nn.functional as F

from tfkit import data as D
from tfkit.data import images


def test_digits():
    split = D.digits()
    assert split.x.shape == (1438, 1, 8, 8) and split.x_test.shape == (359, 1, 8, 8)
    assert split.x.dtype == torch.float32 and split.y.dtype == torch.int64
    assert split.x.min() == 0 and split.x.max() == 1
    assert sorted(set(split.y.tolist())) == sorted(set(split.y_test.tolist())) == list(range(10))
    again, other = D.digits(), D.digits(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(split, again, strict=True))
    assert not torch.equal(split.x, other.x)
    # every image of the source is in exactly one part
    both = torch.cat([split.x, split.x_test]).flatten(1)
    assert len(both) == 1797
    assert torch.equal(both.sum(0), torch.cat([other.x, other.x_test]).flatten(1).sum(0))


@pytest.mark.parametrize("name, size", [("china", (128, 192)), ("flower", (30, 20))])
def test_photograph(name, size):
    image = D.photograph(name, *size)
    assert image.shape == (3, *size) and image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1


SHAPES = {"astronaut": (3, 512, 512), "coins": (1, 303, 384), "horse": (1, 328, 400), "retina": (3, 1411, 1411)}


@pytest.mark.parametrize("name", D.PICTURES)
def test_pictures_lie_in_the_wheels(name):
    image = D.picture(name)
    assert image.dtype == torch.float32 and image.ndim == 3
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.01
    kind = D.PICTURES[name][2].split(",")[0]
    assert len(image) == (3 if kind == "color" else 1)
    assert name not in SHAPES or image.shape == SHAPES[name]


def test_pictures_are_what_scikit_image_reads():
    skimage = pytest.importorskip("skimage.data")
    for name, read in {"cat": skimage.cat, "tissue": skimage.immunohistochemistry, "moon": skimage.moon}.items():
        expected = torch.from_numpy(read()).float().div(255)
        expected = expected.movedim(-1, 0) if expected.ndim == 3 else expected[None]
        assert torch.equal(D.picture(name), expected)
    D.picture("cat").zero_()  # what a reader does to it must not reach the next reader
    assert D.picture("cat").max() > 0.5


def test_photograph_keeps_the_aspect():
    square = D.photograph("coffee", 100, 100)  # stored 400 by 600: the middle 400 columns, averaged 4 by 4
    expected = F.avg_pool2d(D.picture("coffee")[:, :, 100:500], 4)
    assert torch.allclose(square, expected, atol=1e-6)
    assert torch.equal(D.photograph("moon", 64, 64)[0], D.photograph("moon", 64, 64)[2])


@pytest.mark.parametrize("name", sorted({*D.CROPS.values(), *D.PHOTOGRAPHS}))
def test_no_pixel_is_in_both_parts(name, monkeypatch):
    """Where the training cells are 1 and all else is 0, training views are 1 and test views 0 throughout."""
    marked = torch.zeros(1, *D.picture(name).shape[1:])
    for top, left, bottom, right in images._cells(name, False).int().tolist():
        marked[:, top:bottom, left:right] = 1
    images._cells(name, True)  # chosen by the real picture, before it is replaced
    monkeypatch.setattr(images, "picture", lambda _: marked)
    for test, value in ((False, 1.0), (True, 0.0)):
        views = images._views(name, 200, test, torch.Generator().manual_seed(1))
        assert views.shape == (200, 3, 64, 64)
        assert (views - value).abs().max() < 1e-5


def test_views_are_cut_from_the_picture():
    """A view of a ramp is a ramp: its gradient is that of the map, 40/64 to 1 pixels of the picture a pixel."""
    H, W = D.picture("brick").shape[1:]
    ramp = torch.arange(W).float().expand(1, H, W)
    rng = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        images._cells("brick", False)
        patch.setattr(images, "picture", lambda _: ramp)
        x = images._views("brick", 100, False, rng)[:, 0]
    down, right = x.diff(dim=1)[:, :, 1:], x.diff(dim=2)[:, 1:]
    step = (down**2 + right**2).sqrt()  # pixels of the picture a pixel of the view
    assert (step.amax((1, 2)) - step.amin((1, 2))).max() < 1e-3  # the same everywhere in a view
    assert 40 / 64 - 1e-3 < step.min() < 0.66 and 0.96 < step.max() < 1 + 1e-3


def test_crops():
    split = D.crops(count=200, test=50)
    assert split.x.shape == (200, 3, 32, 32) and split.x_test.shape == (50, 3, 32, 32)
    assert split.x.dtype == torch.float32 and split.y.dtype == torch.int64
    assert 0 <= split.x.min() and split.x.max() <= 1
    assert split.y.bincount().tolist() == [20] * 10 and split.y_test.bincount().tolist() == [5] * 10
    assert split.y[:20].unique().numel() > 3  # in random order
    assert all(torch.equal(a, b) for a, b in zip(split, D.crops(200, 50), strict=True))
    assert not torch.equal(split.x, D.crops(200, 50, seed=1).x)


def test_crops_of_half_the_size_are_averages():
    whole, half = D.crops(40, 10, size=64, jitter=0), D.crops(40, 10, size=32, jitter=0)
    assert torch.allclose(F.avg_pool2d(whole.x, 2), half.x, atol=1e-6) and torch.equal(whole.y, half.y)


def test_crops_without_jitter_are_gray_where_the_picture_is():
    split = D.crops(100, 10, jitter=0)
    spread = split.x.std(1).mean((1, 2))
    gray = [k for k, name in enumerate(D.CROPS.values()) if len(D.picture(name)) == 1]
    assert {list(D.CROPS)[k] for k in gray} == {"brick", "coins", "grass", "gravel", "print"}
    is_gray = torch.isin(split.y, torch.tensor(gray))
    assert spread[is_gray].max() == 0 and spread[~is_gray].min() > 0


def test_color_does_not_tell_the_crops_apart_but_shape_does():
    split = D.crops(1000, 500)
    nearest = lambda a, b: (split.y[torch.cdist(b, a).argmin(1)] == split.y_test).float().mean()
    color = nearest(split.x.mean((2, 3)), split.x_test.mean((2, 3)))
    pixels = nearest(split.x.flatten(1), split.x_test.flatten(1))
    gray = lambda x: F.avg_pool2d(x.mean(1, keepdim=True), 1)
    edge = lambda x: torch.stack([gray(x).diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3)], 1)
    edges = nearest(edge(split.x), edge(split.x_test))
    assert 0.1 < color < 0.35 and 0.15 < pixels < 0.45 and 0.2 < edges < 0.7


def test_color_jitter():
    x = torch.rand(6, 3, 5, 4)
    assert torch.allclose(D.color_jitter(x, strength=0), x, atol=1e-6)
    y = D.color_jitter(x * 0.2 + 0.4)
    assert y.shape == x.shape and not torch.allclose(y, x * 0.2 + 0.4, atol=0.01)
    assert 0 <= y.min() and y.max() <= 1
    same = torch.full((9, 3, 2, 2), 0.5)  # gray stays gray under a turn of the hue: only the gains tint it
    ratio = D.color_jitter(same)
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio))


def test_patches():
    x = D.patches(30, size=16)
    assert x.shape == (30, 3, 16, 16) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, D.patches(30, size=16)) and not torch.equal(x, D.patches(30, size=16, part="test"))
    assert torch.allclose(F.avg_pool2d(D.patches(30, size=64), 4), x, atol=1e-6)
    only = D.patches(5, names=["grass"])
    assert torch.equal(only[:, 0], only[:, 2])


def test_faces():
    split = D.faces()
    assert split.x.shape == (150, 1, 25, 25) and split.x_test.shape == (50, 1, 25, 25)
    assert split.y.bincount().tolist() == [75, 75] and split.y_test.bincount().tolist() == [25, 25]
    mean = split.x[split.y == 1].mean(0)[0]  # the mean face has two eyes, darker than the cheeks
    for eye in (slice(5, 8), slice(13, 16)):
        assert mean[7:9, eye].mean() < mean[11:13, eye].mean() - 0.1
    assert D.faces(32).x.shape == (150, 1, 32, 32)
    every = torch.cat([split.x, split.x_test]).flatten(1)
    assert len(every.unique(dim=0)) >= 198 and torch.equal(split.x, D.faces().x)


def test_colored_digits():
    split, plain = D.colored_digits(size=32), D.digits()
    assert split.x.shape == (1438, 3, 32, 32) and torch.equal(split.y, plain.y)
    assert 0 <= split.x.min() and split.x.max() <= 1
    under = D.patches(1438, 32)
    changed = split.x - under
    ink = F.interpolate(plain.x, size=(32, 32), mode="bilinear", align_corners=False)
    assert changed[(ink == 0).expand_as(changed)].abs().max() < 1e-6  # without ink it is the photograph
    color = under + changed / ink.clamp(min=0.5)  # ... and where there is more than half, one color comes through
    inked = (ink > 0.5).expand_as(color)
    low = torch.where(inked, color, torch.inf).amin((2, 3))
    high = torch.where(inked, color, -torch.inf).amax((2, 3))
    assert (high - low).max() < 1e-5
    distance = (low - under.mean((2, 3))).abs()
    assert distance.max() < 0.5 + 1e-5 and (distance > 0.499).float().mean() > 0.99

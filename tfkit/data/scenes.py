"""Scenes with known contents and known geometry: objects with masks and boxes, a stereo pair, two views of points."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tfkit.data._base import at_least, between, folder, generator, one_of, uniform
from tfkit.data.images import _digits, patches, picture

__all__ = ["COINS", "Scenes", "Stereo", "TwoViews", "heights", "mri", "project", "scenes", "stereo", "two_views"]

# The 24 coins of picture("coins") as discs: row and column of the middle, radius, in pixels.
COINS = torch.tensor([
    (44, 335, 28), (51, 155, 22), (51, 215, 22), (52, 276, 19), (54, 44, 20), (56, 100, 18), (119, 271, 24),
    (124, 45, 20), (124, 205, 19), (125, 336, 19), (126, 102, 18), (127, 154, 18), (187, 347, 31), (193, 212, 23),
    (194, 274, 21), (196, 102, 21), (197, 44, 18), (198, 154, 19), (260, 46, 27), (261, 172, 27), (263, 244, 23),
    (263, 301, 25), (266, 114, 21), (268, 358, 21),
])  # fmt: skip


class Scenes(NamedTuple):
    """Photographs with objects: what stands where, to the pixel. Class 0 to 9 is a digit, 10 a coin.

    labels     per pixel the class of the object plus one, 0 for the background
    instances  per pixel the number of the object, from 1, 0 for the background
    boxes      left, top, right, bottom in pixels (right and bottom are the first beyond); 0 beyond the last object
    classes    the class of each object, -1 beyond the last
    """

    images: Float[Tensor, "b 3 H W"]
    labels: Int[Tensor, "b H W"]
    instances: Int[Tensor, "b H W"]
    boxes: Float[Tensor, "b k 4"]
    classes: Int[Tensor, "b k"]


def _object(kind: int, side: int, test: bool, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Colors (3, h, w) and mask (h, w) of a digit in one color or of a coin, cut to its mask."""
    if kind == 10:
        coins = COINS[3::4] if test else COINS[[i for i in range(24) if i % 4 != 3]]
        y, x, r = coins[int(torch.randint(len(coins), (1,), generator=rng))].tolist()
        color = picture("coins")[:, y - r : y + r + 1, x - r : x + r + 1].expand(3, -1, -1)
        color = F.interpolate(color[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
        axis = (torch.arange(side) + 0.5) / side * 2 - 1
        return color, axis[:, None] ** 2 + axis**2 <= 1
    x, y = _digits()
    mine = (y == kind).nonzero()[:, 0]
    mine = mine[-len(mine) // 5 :] if test else mine[: -len(mine) // 5]  # the last fifth, other writers, is for testing
    ink = x[mine[int(torch.randint(len(mine), (1,), generator=rng))]][None]
    mask = F.interpolate(ink, size=(side, side), mode="bilinear", align_corners=False)[0, 0] > 0.4
    rows, columns = (mask.any(d).nonzero() for d in (1, 0))
    mask = mask[rows[0, 0] : rows[-1, 0] + 1, columns[0, 0] : columns[-1, 0] + 1]
    color = torch.randint(2, (3, 1, 1), generator=rng) * 0.6 + uniform(rng, 0, 0.4, 3, 1, 1)
    return color.expand(3, *mask.shape), mask


def scenes(count: int, size: int = 64, objects: int = 4, part: str = "train", seed: int = 0) -> Scenes:
    """One to `objects` real digits and coins upon a real photograph, none over another, with exact masks and boxes.

    The eleven classes are equally likely. A digit is 1/4 to 1/2 of the picture tall and has one random color; a coin is
    as wide. `size` divides 64. In the part "test" photographs, digits and coins are others than in "train". An object
    that finds no free place in 30 tries is left out. Raises ValueError for counts below 1, a size below 16, or more
    than 20 objects.
    """
    at_least(1, count=count, objects=objects)
    at_least(16, size=size)
    between(1, 20, objects=objects)
    images, rng = patches(count, size, part=part, seed=seed), generator(seed + 1)
    labels, instances = torch.zeros(2, count, size, size, dtype=torch.long)
    boxes, classes = torch.zeros(count, objects, 4), torch.full((count, objects), -1)
    wanted = torch.randint(1, objects + 1, (count,), generator=rng).tolist()
    for b in range(count):
        number = 0
        for _ in range(wanted[b]):
            kind = int(torch.randint(11, (1,), generator=rng))
            side = int(torch.randint(size // 4, size // 2 + 1, (1,), generator=rng))
            color, mask = _object(kind, side, part == "test", rng)
            h, w = mask.shape
            for _ in range(30):
                top, left = (int(torch.randint(size - s + 1, (1,), generator=rng)) for s in (h, w))
                here = (b, slice(top, top + h), slice(left, left + w))
                if not (instances[here] > 0).any():
                    images[b, :, top : top + h, left : left + w][:, mask] = color[:, mask]
                    labels[here][mask], instances[here][mask] = kind + 1, number + 1
                    boxes[b, number] = torch.tensor([left, top, left + w, top + h])
                    classes[b, number] = kind
                    number += 1
                    break
    return Scenes(images, labels, instances, boxes, classes)


class Stereo(NamedTuple):
    """Two rectified views, and for each pixel of the left one how many columns further left it lies in the right one.

    Where the truth is not known, `disparity` is NaN. Depth in mm is focal * baseline / (disparity + offset).
    """

    left: Float[Tensor, "3 H W"]
    right: Float[Tensor, "3 H W"]
    disparity: Float[Tensor, "H W"]
    focal: float
    baseline: float
    offset: float

    def depth(self) -> Float[Tensor, "H W"]:
        """Distance from the camera along its axis, in mm; NaN where it is not known."""
        return self.focal * self.baseline / (self.disparity + self.offset)


def stereo(factor: int = 1) -> Stereo:
    """A motorcycle, seen by two cameras 193.001 mm apart, 500 by 741 pixels; averaged over `factor` by `factor` pixels.

    Focal length 994.978 pixels and the principal points' offset 31.086 pixels shrink with it. Source: "High-resolution
    stereo datasets with subpixel-accurate ground truth", 2014, inside scikit-image.
    """
    between(1, 16, factor=factor)
    from PIL import Image

    data = folder("skimage") / "data"
    with np.load(data / "motorcycle_disp.npz") as stored, Image.open(data / "motorcycle_right.png") as image:
        disparity = torch.from_numpy(stored["arr_0"]).float()
        right = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    disparity = disparity.where(disparity.isfinite(), torch.nan)
    views = [F.avg_pool2d(v, factor) for v in (picture("motorcycle"), right, disparity[None])]
    return Stereo(views[0], views[1], views[2][0] / factor, 994.978 / factor, 193.001, 31.086 / factor)


class TwoViews(NamedTuple):
    """Points in the first camera's frame, their images in both, and the motion: X2 = rotation X1 + translation.

    Images are in units of the focal length (x / z, y / z), so x2^T E x1 = 0 with E = [translation]_x rotation.
    """

    points: Float[Tensor, "b n 3"]
    first: Float[Tensor, "b n 2"]
    second: Float[Tensor, "b n 2"]
    rotation: Float[Tensor, "b 3 3"]
    translation: Float[Tensor, "b 3"]

    def essential(self) -> Float[Tensor, "b 3 3"]:
        """E = [t]_x R, the matrix of the epipolar constraint."""
        return torch.linalg.cross(self.translation.unsqueeze(-1), self.rotation, dim=1)


def project(points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 2"]:
    """The pinhole camera at the origin that looks along z: (x / z, y / z)."""
    return points[..., :2] / points[..., 2:]


def two_views(count: int, points: int = 32, noise: float = 0.0, turn: float = 0.4, seed: int = 0) -> TwoViews:
    """Random points at depths 4 to 8, seen by two cameras one unit apart, turned by up to `turn` radians; float64.

    noise   standard deviation added to both images, in units of the focal length
    Raises ValueError when there are fewer than 8 points, or the turn could bring a point behind a camera (above 0.6).
    """
    at_least(1, count=count)
    at_least(8, points=points)
    at_least(0, noise=noise)
    between(0, 0.6, turn=turn)
    rng = generator(seed)
    double = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    chance = torch.rand(count, points + 1, 3, generator=rng, dtype=torch.float64)
    depth = 4 + 4 * chance[:, 1:, 2:]
    world = torch.cat([(chance[:, 1:, :2] - 0.5) * depth, depth], -1)  # (b, n, 3)
    axis = F.normalize(double(count, 3), dim=-1) * turn * chance[:, 0, :1]
    basis = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
    rotation = torch.linalg.matrix_exp(torch.linalg.cross(axis.unsqueeze(2), basis, dim=1))  # of the map [axis]_x
    translation = F.normalize(double(count, 3), dim=-1)
    moved = world @ rotation.mT + translation.unsqueeze(1)
    first, second = (project(p) + noise * double(count, points, 2) for p in (world, moved))
    return TwoViews(world, first, second, rotation, translation)


def mri() -> Float[Tensor, "1 256 256"]:
    """One slice of a human head by magnetic resonance, in [0, 1] (stored values over 255). Source: matplotlib."""
    import gzip

    with gzip.open(folder("matplotlib") / "mpl-data/sample_data/s1045.ima.gz") as file:
        return torch.from_numpy(np.frombuffer(file.read(), ">u2").astype(np.float32)).view(1, 256, 256) / 255


def heights(name: str = "jacksboro") -> Float[Tensor, "H W"]:
    """Terrain in meters above the sea, real: "jacksboro" (a fault in Tennessee) or "topobathy" (Vancouver Island).

    The first has 344 by 403 places 1/1200 of a degree apart, the second 91 by 120 and depths of the sea below 0.
    """
    one_of("heights", name, ("jacksboro", "topobathy"))
    file, key = ("jacksboro_fault_dem", "elevation") if name == "jacksboro" else (name, "topo")
    with np.load(folder("matplotlib") / f"mpl-data/sample_data/{file}.npz") as stored:
        return torch.from_numpy(stored[key].astype(np.float32))

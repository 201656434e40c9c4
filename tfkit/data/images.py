"""Real pictures, and classification sets cut from them. Images are (b, c, H, W), float32 in [0, 1].

The pictures lie inside the wheels of scikit-image, scikit-learn and matplotlib; nothing is downloaded. A set for
training and testing cuts each picture into cells first and gives each cell to one part, so that no pixel is in both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tfkit.data._base import Split, at_least, between, folder, generator, one_of, share, uniform

__all__ = [
    "CROPS", "PHOTOGRAPHS", "PICTURES", "Split", "color_jitter", "colored_digits", "crops", "digits", "faces",
    "patches", "photograph", "picture",
]  # fmt: skip

# name: (package, file, what it shows and where it comes from)
PICTURES = {
    "astronaut": ("skimage", "data/astronaut.png", "color, Eileen Collins; NASA, public domain"),
    "brick": ("skimage", "data/brick.png", "gray, a brick wall; CC0Textures, CC0"),
    "camera": ("skimage", "data/camera.png", "gray, a man with a camera; Lav Varshney, CC0"),
    "cat": ("skimage", "data/chelsea.png", "color, Chelsea the cat; Stefan van der Walt, CC0"),
    "cell": ("skimage", "data/cell.png", "gray, phase image of a cell, 0.107 um a pixel; Mueller et al. 2018, CC0"),
    "china": ("sklearn", "datasets/images/china.jpg", "color, a temple; Yannis Pseftogiannis, CC BY"),
    "clock": ("skimage", "data/clock_motion.png", "gray, a clock blurred by motion; van der Walt, public domain"),
    "coffee": ("skimage", "data/coffee.png", "color, a cup of coffee; Rachel Michetti, CC0"),
    "coins": ("skimage", "data/coins.png", "gray, 24 Greek coins; Brooklyn Museum, no known restrictions"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "color, a dahlia; dany13, CC BY"),
    "grass": ("skimage", "data/grass.png", "gray, grass; linolafett, CC0"),
    "gravel": ("skimage", "data/gravel.png", "gray, gravel; CC0Textures, CC0"),
    "hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "color, Grace Hopper; US Navy, public domain"),
    "horse": ("skimage", "data/horse.png", "gray, silhouette of a horse, which is 0; openclipart, CC0"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg", "color, galaxies; NASA, public domain"),
    "microaneurysms": ("skimage", "data/microaneurysms.png", "gray, retina with lesions; HRF database, CC0"),
    "moon": ("skimage", "data/moon.png", "gray, surface of the moon; from scikit-image"),
    "motorcycle": ("skimage", "data/motorcycle_left.png", "color, a motorcycle; Middlebury stereo 2014"),
    "page": ("skimage", "data/page.png", "gray, a printed page, lit unevenly; from scikit-image"),
    "phantom": ("skimage", "data/phantom.png", "gray, head phantom of Shepp and Logan 1974; computed"),
    "retina": ("skimage", "data/retina.jpg", "color, a healthy human retina; Mikael Haeggstroem, CC0"),
    "rocket": ("skimage", "data/rocket.jpg", "color, a rocket at night; SpaceX, public domain"),
    "text": ("skimage", "data/text.png", "gray, handwritten signs on stone; Wikipedia, public domain"),
    "tissue": ("skimage", "data/ihc.png", "color, stained tissue of the colon; CMMI, no known restrictions"),
}
# The color photographs of things as one meets them: the default backgrounds.
PHOTOGRAPHS = ("astronaut", "cat", "china", "coffee", "flower", "hopper", "motorcycle", "rocket")


@functools.cache
def _pixels(name: str) -> Tensor:
    """The picture as stored, uint8 (1 or 3, H, W)."""
    from PIL import Image

    package, file, _ = PICTURES[name]
    with Image.open(folder(package) / file) as image:
        if image.mode == "RGBA":  # the horse, drawn on a transparent ground
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("L")
        array = np.array(image.convert("L" if name == "phantom" else image.mode))
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def picture(name: str) -> Float[Tensor, "c H W"]:
    """A picture as it is stored, in [0, 1]: (1, H, W) when gray, (3, H, W) in color.

    `PICTURES` lists the names, what each shows, its source and its licence. Raises ValueError for another name.
    """
    one_of("picture", name, PICTURES)
    return _pixels(name).float() / 255


def photograph(name: str = "china", height: int = 128, width: int = 192) -> Float[Tensor, "3 height width"]:
    """A picture in three channels in [0, 1], cut centrally to the aspect asked for, resized by area averaging.

    Raises ValueError for a name that `PICTURES` lacks or a side below 1.
    """
    one_of("photograph", name, PICTURES)
    at_least(1, height=height, width=width)
    image = picture(name).expand(3, -1, -1)
    H, W = image.shape[1:]
    h, w = min(H, round(W * height / width)), min(W, round(H * width / height))
    top, left = (H - h) // 2, (W - w) // 2
    return F.adaptive_avg_pool2d(image[:, top : top + max(h, 1), left : left + max(w, 1)], (height, width))


def digits(test: float = 0.2, seed: int = 0) -> Split:
    """1,797 handwritten digits: images Float (b, 1, 8, 8) in [0, 1], labels Int (b,) in 0..9, split at random.

    Source: UCI "Optical Recognition of Handwritten Digits", stored inside scikit-learn.
    """
    share(test=test)
    x, y = _digits()
    order = torch.randperm(len(x), generator=generator(seed))
    cut = round(len(x) * (1 - test))
    return Split(x[order[:cut]], y[order[:cut]], x[order[cut:]], y[order[cut:]])


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    table = np.loadtxt(folder("sklearn") / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1]).view(-1, 1, 8, 8) / 16  # (b, 1, 8, 8)
    return x, torch.from_numpy(table[:, -1]).long()


# ------------------------------------------------------------------------------------------------- crops without a leak

FIELD, CELL = 64, 95  # pixels of the picture: the widest crop, and the side of a cell


@functools.cache
def _cells(name: str, test: bool) -> Float[Tensor, "cells 4"]:
    """The cells of a picture that belong to one part: top, left, bottom, right in pixels, without the flattest quarter.

    Of all cells one in four or five is for testing.
    """
    H, W = _pixels(name).shape[1:]
    rows, columns = H // CELL, W // CELL
    if rows * columns < 4:
        raise ValueError(f"{name!r} has {H} by {W} pixels, too few cells of {CELL} to split; take another picture")
    ys, xs = (torch.linspace(0, n, k + 1).int().tolist() for n, k in ((H, rows), (W, columns)))
    cells = [
        (ys[i], xs[j], ys[i + 1], xs[j + 1])
        for i in range(rows) for j in range(columns) if ((2 * i + j) % 4 == 3) == test
    ]  # fmt: skip
    gray = picture(name).mean(0)
    detail = [float(gray[top:bottom, left:right].std()) for top, left, bottom, right in cells]
    return torch.tensor([cell for _, cell in sorted(zip(detail, cells, strict=True))[len(cells) // 4 :]]).float()


def _views(name: str, count: int, test: bool, rng: torch.Generator) -> Float[Tensor, "count 3 64 64"]:
    """Random views into one part of a picture, 40 to 64 pixels wide, mirrored and turned.

    The angle is a multiple of 90 degrees and up to 15 more. A view lies inside one cell, with a pixel to spare for
    the interpolation.
    """
    cells = _cells(name, test)
    cells = cells[torch.randint(len(cells), (count,), generator=rng)]
    side = uniform(rng, 40, FIELD, count)
    angle = uniform(rng, -0.26, 0.26, count)
    reach = side / 2 * (angle.cos() + angle.sin().abs()) + 1  # half the height of the turned square
    y, x = (
        cells[:, k] + reach + torch.rand(count, generator=rng) * (cells[:, k + 2] - cells[:, k] - 2 * reach)
        for k in (0, 1)
    )
    angle = angle + torch.pi / 2 * torch.randint(4, (count,), generator=rng)
    mirror = torch.randint(2, (count,), generator=rng) * 2 - 1
    H, W = _pixels(name).shape[1:]
    cos, sin = (angle.cos() * side).view(-1, 1, 1), (angle.sin() * side).view(-1, 1, 1)
    across = (torch.arange(FIELD) + 0.5) / FIELD - 0.5  # from the middle of the view, in its sides
    u, v = mirror.view(-1, 1, 1) * across, across.view(-1, 1)
    columns, rows = x.view(-1, 1, 1) + u * cos - v * sin, y.view(-1, 1, 1) + u * sin + v * cos  # (b, 64, 64), pixels
    grid = torch.stack([2 * columns / W - 1, 2 * rows / H - 1], -1)  # as grid_sample counts
    tall = F.grid_sample(picture(name)[None], grid.view(1, -1, FIELD, 2), align_corners=False)[0]  # (c, b 64, 64)
    return tall.unflatten(1, (count, FIELD)).transpose(0, 1).expand(-1, 3, -1, -1)


def color_jitter(x: Float[Tensor, "b 3 H W"], seed: int = 0, strength: float = 1.0) -> Float[Tensor, "b 3 H W"]:
    """Turn the hue of each image by a random angle, then scale contrast, brightness and each channel; result in [0, 1].

    After it the colors of a picture no longer tell where a crop comes from: shape and texture must. `strength` 0
    changes nothing, 1 turns by up to 180 degrees and scales by 0.6 to 1.4.
    """
    at_least(0, strength=strength)
    rng, b = generator(seed), len(x)
    angle = uniform(rng, -torch.pi, torch.pi, b, 1, 1) * min(strength, 1)
    gray = torch.full((3, 3), 1 / 3)  # the projection on the gray axis
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    turn = gray + angle.cos() * (torch.eye(3) - gray) + angle.sin() * cross  # (b, 3, 3), Rodrigues about that axis
    gain = 1 + uniform(rng, -0.4, 0.4, b, 3, 1) * strength
    shift = uniform(rng, -0.15, 0.15, b, 1, 1) * strength
    return ((gain * (turn @ x.flatten(2)) + shift).clamp(0, 1)).view_as(x)


def _shrink(x: Tensor, size: int) -> Tensor:
    if size < 1 or FIELD % size:
        raise ValueError(f"size must divide {FIELD}, the pixels of a view; got {size}")
    return F.avg_pool2d(x, FIELD // size)


def patches(
    count: int, size: int = 32, names: Sequence[str] = PHOTOGRAPHS, part: str = "train", seed: int = 0
) -> Float[Tensor, "count 3 size size"]:
    """Random views of photographs, colors as they are: for backgrounds, restoration and learning without labels.

    part   "train" or "test": regions of the same pictures that share no pixel
    A size of 32 is the view of size 64 averaged over 2 by 2 pixels, and so on. Raises ValueError for an unknown name,
    a picture below 95 pixels, a size that does not divide 64.
    """
    at_least(1, count=count)
    one_of("part", part, ("train", "test"))
    if not names:
        raise ValueError(f"names must hold at least one picture, got {names!r}")
    for name in names:
        one_of("names", name, PICTURES)
    rng = generator(seed)
    owner = torch.randint(len(names), (count,), generator=rng)
    x = torch.empty(count, 3, size, size)
    for k, name in enumerate(names):
        if n := int((owner == k).sum()):
            x[owner == k] = _shrink(_views(name, n, part == "test", rng), size)
    return x


# class: the picture it is cut from
CROPS = {
    "brick": "brick", "cat": "cat", "coins": "coins", "engine": "motorcycle", "grass": "grass", "gravel": "gravel",
    "print": "page", "stars": "hubble", "temple": "china", "tissue": "tissue",
}  # fmt: skip


def crops(count: int = 2000, test: int = 500, size: int = 32, jitter: float = 1.0, seed: int = 0) -> Split:
    """Real crops of ten kinds, to be told apart by texture and shape: x (b, 3, size, size) in [0, 1], y in 0..9.

    The classes are the keys of `CROPS`, each with the same number of images, in random order. Crops for training and
    for testing come from regions without a common pixel; each is turned, mirrored and scaled at random, its colors are
    jittered, and of three views the flattest (sky, shadow) is left out. A size of 32 is size 64 averaged over 2 by 2.
    Test accuracy after 300 steps of batch 64 at size 32: linear layer 24%, small convolution net 73 to 83%, small ViT
    76%; nearest neighbor by pixels 33 to 37%, by mean color 23%.
    Raises ValueError when `count` or `test` is no multiple of ten, or `size` does not divide 64.
    """
    at_least(len(CROPS), count=count, test=test)
    rng, parts = generator(seed), []
    for total, held_out in ((count, False), (test, True)):
        each, rest = divmod(total, len(CROPS))
        if rest:
            raise ValueError(f"count and test must be multiples of {len(CROPS)}, the classes; got {count} and {test}")
        views = (_views(name, each + -(-each // 2), held_out, rng) for name in CROPS.values())
        x = torch.cat([_shrink(v[v[..., ::4, ::4].mean(1).flatten(1).std(1).topk(each).indices], size) for v in views])
        y = torch.arange(len(CROPS)).repeat_interleave(each)
        order = torch.randperm(total, generator=rng)
        parts += [color_jitter(x, seed + held_out, jitter)[order], y[order]]
    return Split(*parts)


def faces(size: int = 25, test: float = 0.25, seed: int = 0) -> Split:
    """100 real faces (label 1) and 100 pictures without a face (0): x (b, 1, size, size) in [0, 1], stored at size 25.

    Each part has as many faces as others. The others are cuttings beside the faces, often with a black border, so a
    linear layer tells most of them apart. Source: "Labeled Faces in the Wild", 2007, the subset inside scikit-image.
    """
    share(test=test)
    at_least(1, size=size)
    x = torch.from_numpy(np.load(folder("skimage") / "data/lfw_subset.npy")).float().unsqueeze(1)  # (200, 1, 25, 25)
    if size != 25:
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    rng, cut = generator(seed), round(100 * (1 - test))
    pairs = torch.randperm(100, generator=rng), torch.randperm(100, generator=rng) + 100
    out = []
    for part in (slice(0, cut), slice(cut, None)):
        index = torch.cat([p[part] for p in pairs])
        index = index[torch.randperm(len(index), generator=rng)]
        out += [x[index], (index < 100).long()]
    return Split(*out)


def colored_digits(size: int = 32, test: float = 0.2, contrast: float = 0.5, seed: int = 0) -> Split:
    """The 1,797 real digits, enlarged, in a random color upon a random real photograph: x (b, 3, size, size) in [0, 1].

    The ink covers the photograph by the digit's own gray value. Its color differs from the mean of the photograph
    below by `contrast` in each channel, upwards or downwards. Labels 0..9; the parts share neither a digit, split as in
    `digits`, nor a pixel of the photographs. Nearest neighbor by pixels reads 66 to 71% of the test part, with contrast
    0.25 about 34%. Raises ValueError as `digits` and `patches` do.
    """
    between(0, 1, contrast=contrast)
    split, rng, parts = digits(test, seed), generator(seed), []
    for part, x, y in (("train", *split[:2]), ("test", *split[2:])):
        under = patches(len(x), size, part=part, seed=seed)
        mean = under.mean((2, 3), keepdim=True)
        sign = torch.randint(2, mean.shape, generator=rng) * 2 - 1
        sign = torch.where((mean + sign * contrast - 0.5).abs() > 0.5, -sign, sign)  # towards the side with room
        ink = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        parts += [under + ink * ((mean + sign * contrast).clamp(0, 1) - under), y]
    return Split(*parts)

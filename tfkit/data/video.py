"""Video with known motion. Frames are (b, t, c, H, W) in [0, 1]; motions are in pixels a frame."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tfkit.data._base import at_least, generator, one_of
from tfkit.data.images import PHOTOGRAPHS, _digits, picture

__all__ = ["MovingDigits", "Pan", "moving_digits", "pan"]


class MovingDigits(NamedTuple):
    """Digits that fly and bounce: the frames, each one's label, its upper left corner (row, column) at each time."""

    frames: Float[Tensor, "b t 1 H W"]
    labels: Int[Tensor, "b k"]
    corners: Int[Tensor, "b k t 2"]


def moving_digits(
    count: int, frames: int = 10, size: int = 32, digits: int = 2, speed: int = 3, scale: int = 1, seed: int = 0
) -> MovingDigits:
    """Real digits of 8 * scale pixels that move by a whole number of pixels a frame and bounce off the frame's edges.

    Each velocity component is drawn from -speed to speed, not both zero. Where digits meet, the brighter pixel shows.
    Raises ValueError when a digit does not fit or could cross the whole frame in one step.
    """
    at_least(1, count=count, frames=frames, digits=digits, speed=speed, scale=scale)
    room = size - 8 * scale  # the largest corner
    if room < speed:
        raise ValueError(f"size {size} leaves {room} pixels for digits of {8 * scale} that move by up to {speed}")
    rng, (images, targets) = generator(seed), _digits()
    chosen = torch.randint(len(images), (count, digits), generator=rng)
    start = torch.randint(room + 1, (count, digits, 1, 2), generator=rng)
    velocity = torch.randint((2 * speed + 1) ** 2 - 1, (count, digits, 1), generator=rng)
    velocity = velocity + (velocity >= 2 * speed * (speed + 1)).long()  # skip the middle of the square, (0, 0)
    velocity = torch.stack([velocity // (2 * speed + 1), velocity % (2 * speed + 1)], -1) - speed  # (b, k, 1, 2)
    free = (start + velocity * torch.arange(frames).view(-1, 1)) % (2 * room)  # (b, k, t, 2)
    corners = room - (free - room).abs()  # a triangle wave: reflection at 0 and at room
    sprites = images[chosen, 0].repeat_interleave(scale, -1).repeat_interleave(scale, -2)  # (b, k, s, s)
    canvas, s = torch.zeros(count, digits, frames, size, size), torch.arange(8 * scale)
    rows, columns = (corners[..., d, None] + s for d in (0, 1))  # (b, k, t, s)
    b, k, t = torch.meshgrid(*(torch.arange(n) for n in (count, digits, frames)), indexing="ij")
    place = (b[..., None, None], k[..., None, None], t[..., None, None], rows[..., :, None], columns[..., None, :])
    canvas[place] = sprites.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    return MovingDigits(canvas.amax(1).unsqueeze(2), targets[chosen], corners)


class Pan(NamedTuple):
    """A window that glides over a photograph: the frames, and its velocity (rows, columns) in pixels a frame.

    frames[:, t + 1, :, y, x] = frames[:, t, :, y + velocity[:, 0], x + velocity[:, 1]] wherever both exist; so the
    optical flow, what a point of the scene does, is -velocity at every pixel.
    """

    frames: Float[Tensor, "b t 3 H W"]
    velocity: Int[Tensor, "b 2"]


def pan(count: int, frames: int = 8, size: int = 32, speed: int = 3, part: str = "train", seed: int = 0) -> Pan:
    """Real photographs under uniform motion, exact to the pixel: a scene averaged over 2 by 2 pixels, a window on it.

    The windows of "train" lie in the left 7/10 of each picture, those of "test" in the right 3/10. Raises ValueError
    when the window's way, size + (frames - 1) * speed, does not fit into 3/10 of the narrowest picture.
    """
    at_least(1, count=count, frames=frames, size=size)
    at_least(0, speed=speed)
    one_of("part", part, ("train", "test"))
    rng, way = generator(seed), (frames - 1) * speed
    wide = ("coffee", "china", "flower", "motorcycle", "rocket")
    scenes = [F.avg_pool2d(picture(name), 2) for name in wide if name in PHOTOGRAPHS]
    cut = [round(0.7 * scene.shape[2]) for scene in scenes]
    scenes = [s[:, :, :c] if part == "train" else s[:, :, c:] for s, c in zip(scenes, cut, strict=True)]
    fits = min(min(s.shape[1:]) for s in scenes)
    if size + way > fits:
        raise ValueError(f"a window of {size} that moves by up to {way} needs {size + way} pixels; there are {fits}")
    owner = torch.randint(len(scenes), (count,), generator=rng).tolist()
    velocity = torch.randint(-speed, speed + 1, (count, 2), generator=rng)
    out = torch.empty(count, frames, 3, size, size)
    for b, scene in enumerate(scenes[k] for k in owner):
        moved = velocity[b] * (frames - 1)
        room = torch.tensor(scene.shape[1:]) - size - moved.abs()
        corner = (torch.rand(2, generator=rng) * (room + 1)).long() + (-moved).clamp(min=0)
        for t in range(frames):
            y, x = (corner + t * velocity[b]).tolist()
            out[b, t] = scene[:, y : y + size, x : x + size]
    return Pan(out, velocity)

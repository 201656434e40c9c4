"""Damaged photographs beside the whole ones, with exactly what was done to them. Images (b, 3, H, W) in [0, 1]."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tfkit.data._base import at_least, generator, one_of, share, uniform
from tfkit.data.images import patches

__all__ = ["DAMAGES", "Restoration", "blur", "gaussian_kernel", "holes", "motion_kernel", "restoration"]


def gaussian_kernel(size: int = 9, sigma: float = 1.5) -> Float[Tensor, "size size"]:
    """A blur kernel exp(-r^2 / 2 sigma^2), divided by its sum; sigma in pixels. Raises ValueError for an even size."""
    _odd(size)
    at_least(1e-6, sigma=sigma)
    line = torch.exp(-((torch.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    return line.outer(line) / line.sum() ** 2


def motion_kernel(size: int = 9, angle: float = 0.0) -> Float[Tensor, "size size"]:
    """A straight stroke of length size - 1 pixels through the middle, sum 1; `angle` in radians above the rows."""
    _odd(size)
    t, axis = torch.linspace(-1, 1, 16 * size) * (size // 2), torch.arange(size).unsqueeze(1) - size // 2
    y, x = -t * torch.tensor(angle).sin(), t * torch.tensor(angle).cos()
    kernel = (1 - (axis - y).abs()).clamp(min=0) @ (1 - (axis - x).abs()).clamp(min=0).T  # drops, spread bilinearly
    return kernel / kernel.sum()


def _odd(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a kernel needs an odd size of at least 1, got {size}")


def blur(x: Float[Tensor, "b c H W"], kernel: Float[Tensor, "k k"]) -> Float[Tensor, "b c H W"]:
    """Each channel convolved with the kernel; beyond the edge the image continues as its mirror image."""
    k, (_, c, H, W) = len(kernel), x.shape
    _odd(k)
    if k // 2 >= min(H, W):
        raise ValueError(f"a kernel of size {k} is too large for an image of {H} by {W}")
    return F.conv2d(F.pad(x, [k // 2] * 4, mode="reflect"), kernel.flip(0, 1).to(x).expand(c, 1, k, k), groups=c)


def holes(
    count: int, size: int, missing: float = 0.25, pieces: int = 3, seed: int = 0
) -> Bool[Tensor, "count 1 size size"]:
    """Masks, True where the image is known: `pieces` rectangles are missing, each of area missing / pieces at most.

    Their side ratios lie between 1/2 and 2; where they overlap the hole is smaller than `missing`.
    """
    share(missing=missing)
    at_least(1, count=count, size=size, pieces=pieces)
    rng, axis = generator(seed), torch.arange(size)
    area = missing / pieces * size**2
    h = (area * uniform(rng, -1, 1, count, pieces).exp2()).sqrt().floor().clamp(1, size)
    w = (area / h).floor().clamp(1, size)
    top, left = ((torch.rand(count, pieces, generator=rng) * (size - s + 1)).floor() for s in (h, w))
    inside = lambda first, extent: (axis >= first[..., None]) & (axis < (first + extent)[..., None])  # (b, pieces, s)
    return ~(inside(top, h).unsqueeze(-1) & inside(left, w).unsqueeze(-2)).any(1, keepdim=True)


class Restoration(NamedTuple):
    """Whole images (b, 3, H, W), the damaged ones, and what was done: see `DAMAGES`."""

    clean: Float[Tensor, "b 3 H W"]
    damaged: Tensor
    cause: Tensor


# kind: what was done; what `cause` holds
DAMAGES = {
    "blur": "convolved with a Gaussian of sigma 1.5 * strength; the kernel (9, 9)",
    "motion": "convolved with a stroke of 8 pixels at a random angle; the kernel (9, 9)",
    "noise": "normal noise of deviation 0.1 * strength added, not clipped; the noise (b, 3, H, W)",
    "rain": "strokes of light added, then clipped to 1; the light (b, 1, H, W), up to 0.6 * strength",
    "dark": "low light: gain * x ** 2; the gain, a scalar 0.3 / strength",
    "holes": "about 25% * strength set to 0; the mask (b, 1, H, W), True where known",
    "small": "averaged over squares; their side, a scalar 2 * strength",
}


def restoration(
    kind: str, count: int = 64, size: int = 32, part: str = "train", strength: float = 1.0, seed: int = 0
) -> Restoration:
    """Pairs of real photographs, whole and damaged in a known way; `DAMAGES` lists the kinds and what `cause` holds.

    Training and test parts share no pixel (see `patches`). Raises ValueError for an unknown kind or a strength below
    0.1, and for "small" when the factor does not divide the size.
    """
    one_of("restoration", kind, DAMAGES)
    at_least(0.1, strength=strength)
    x, rng = patches(count, size, part=part, seed=seed), generator(seed + 1)
    if kind in ("blur", "motion"):
        angle = float(uniform(rng, 0, torch.pi, 1))
        cause = gaussian_kernel(9, 1.5 * strength) if kind == "blur" else motion_kernel(9, angle)
        return Restoration(x, blur(x, cause), cause)
    if kind == "noise":
        cause = 0.1 * strength * torch.randn(x.shape, generator=rng)
        return Restoration(x, x + cause, cause)
    if kind == "rain":
        drops = (torch.rand(count, 1, size, size, generator=rng) < 0.02) * uniform(rng, 0.3, 1, count, 1, size, size)
        stroke = motion_kernel(9, 1.3)
        cause = 0.6 * strength * blur(drops, stroke / stroke.max()).clamp(max=1)
        return Restoration(x, (x + cause).clamp(max=1), cause)
    if kind == "dark":
        cause = torch.tensor(0.3 / strength)
        return Restoration(x, cause * x**2, cause)
    if kind == "holes":
        cause = holes(count, size, 0.25 * strength, seed=seed + 1)
        return Restoration(x, x * cause, cause)
    factor = round(2 * strength)
    if factor < 1 or size % factor:
        raise ValueError(f"the factor {factor} must divide the size {size}")
    return Restoration(x, F.avg_pool2d(x, factor), torch.tensor(factor))

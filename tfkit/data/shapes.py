"""Parametric solids: signed distances and measures in closed form, meshes and point clouds of their surfaces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tfkit.data._base import at_least, generator, one_of, uniform

__all__ = ["SOLIDS", "Clouds", "Mesh", "Solid", "clouds"]

# kind: what its sizes are; the axis of cylinder and torus is z
SOLIDS = {
    "sphere": "radius",
    "box": "half of its width, depth and height",
    "cylinder": "radius, half of its height",
    "torus": "radius of the ring, radius of the tube, which is smaller",
}


class Mesh(NamedTuple):
    """Triangles that share vertices: a closed surface whose triangles turn counterclockwise, seen from outside."""

    vertices: Float[Tensor, "v 3"]
    faces: Int[Tensor, "f 3"]

    def euler(self) -> int:
        """V - E + F: 2 for a ball, 0 for a ring."""
        edges = torch.cat([self.faces[:, [i, j]] for i, j in ((0, 1), (1, 2), (2, 0))]).sort(1).values
        return len(self.vertices) - len(edges.unique(dim=0)) + len(self.faces)

    def volume(self) -> float:
        """The sum of the signed tetrahedra between the origin and each triangle."""
        a, b, c = self.vertices[self.faces].unbind(1)
        return float((a * torch.linalg.cross(b, c)).sum() / 6)

    def areas(self) -> Float[Tensor, "f"]:
        """The area of each triangle."""
        a, b, c = self.vertices[self.faces].unbind(1)
        return torch.linalg.cross(b - a, c - a).norm(dim=1) / 2


@dataclass(frozen=True)
class Solid:
    """A solid around the origin: `Solid("torus", (0.7, 0.2))`. `SOLIDS` lists the kinds and what the sizes mean.

    Raises ValueError for an unknown kind, or sizes that are not positive, too few, too many or no torus.
    """

    kind: str
    sizes: tuple[float, ...]

    def __post_init__(self):
        one_of("kind", self.kind, SOLIDS)
        wanted = {"sphere": 1, "box": 3}.get(self.kind, 2)
        if len(self.sizes) != wanted or min(self.sizes) <= 0:
            raise ValueError(f"a {self.kind} takes {wanted} positive sizes ({SOLIDS[self.kind]}), got {self.sizes}")
        if self.kind == "torus" and self.sizes[0] <= self.sizes[1]:
            raise ValueError(f"the ring of a torus must be wider than its tube, got {self.sizes}")

    def sdf(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b"]:
        """Signed distance to the surface: negative inside, and of slope 1 wherever the nearest point is unique."""
        x, y, z = points.unbind(-1)
        s = self.sizes
        if self.kind == "sphere":
            return points.norm(dim=-1) - s[0]
        if self.kind == "torus":
            return torch.hypot(torch.hypot(x, y) - s[0], z) - s[1]
        beyond = points.abs() - points.new_tensor(s) if self.kind == "box" else None
        if self.kind == "cylinder":
            beyond = torch.stack([torch.hypot(x, y) - s[0], z.abs() - s[1]], -1)
        return beyond.clamp(min=0).norm(dim=-1) + beyond.amax(-1).clamp(max=0)

    def measures(self) -> tuple[float, float, int]:
        """Volume, area of the surface and Euler characteristic, in closed form."""
        r, h, depth = (*self.sizes, 0.0, 0.0)[:3]
        return {
            "sphere": (4 / 3 * math.pi * r**3, 4 * math.pi * r**2, 2),
            "box": (8 * r * h * depth, 8 * (r * h + r * depth + h * depth), 2),
            "cylinder": (2 * math.pi * r**2 * h, 2 * math.pi * r * (r + 2 * h), 2),
            "torus": (2 * math.pi**2 * r * h**2, 4 * math.pi**2 * r * h, 0),
        }[self.kind]

    def mesh(self, resolution: int = 32) -> Mesh:
        """The surface by marching cubes on resolution^3 values of the signed distance; vertices then moved onto it.

        Edges of a box or a cylinder are cut off within one grid step.
        """
        at_least(8, resolution=resolution)
        from skimage.measure import marching_cubes

        reach = 1.2 * (sum(self.sizes) if self.kind == "torus" else max(self.sizes))
        axis = torch.linspace(-reach, reach, resolution, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
        step = 2 * reach / (resolution - 1)
        vertices, faces, *_ = marching_cubes(self.sdf(grid).numpy(), 0.0)
        vertices = torch.from_numpy(vertices.copy()).double() * step - reach
        return Mesh(self._onto(vertices), torch.from_numpy(faces.copy()).long())

    def _onto(self, points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        distance = self.sdf(points)
        (normal,) = torch.autograd.grad(distance.sum(), points)
        return (points - distance.unsqueeze(-1) * normal).detach()

    def sample(self, count: int, seed: int = 0, resolution: int = 32) -> Float[Tensor, "count 3"]:
        """Points on the surface, uniform up to the fineness of the mesh: triangles by area, then moved onto it."""
        at_least(1, count=count)
        mesh, rng = self.mesh(resolution), generator(seed)
        chosen = mesh.vertices[mesh.faces[torch.multinomial(mesh.areas(), count, True, generator=rng)]]  # (count, 3, 3)
        u, v = torch.rand(2, count, 1, generator=rng, dtype=torch.float64)
        u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
        a, b, c = chosen.unbind(1)
        return self._onto(a + u * (b - a) + v * (c - a)).float()


class Clouds(NamedTuple):
    """Point clouds (b, n, 3) and the index of their kind in `SOLIDS`."""

    x: Float[Tensor, "b n 3"]
    y: Int[Tensor, "b"]


def clouds(count: int, points: int = 128, noise: float = 0.01, seed: int = 0) -> Clouds:
    """Surface points of solids of random kind and sizes, turned at random, scaled into the unit ball; noise last.

    Raises ValueError for counts below 1 or negative noise.
    """
    at_least(1, count=count, points=points)
    at_least(0, noise=noise)
    rng, kinds, out = generator(seed), list(SOLIDS), []
    y = torch.randint(len(kinds), (count,), generator=rng)
    for k in y.tolist():
        sizes = uniform(rng, 0.4, 1.0, {"sphere": 1, "box": 3}.get(kinds[k], 2)).tolist()
        if kinds[k] == "torus":
            sizes = [1.0, 0.2 + 0.4 * (sizes[0] - 0.4)]
        x = Solid(kinds[k], tuple(sizes)).sample(points, int(torch.randint(2**31, (1,), generator=rng)), 20)
        turn = torch.linalg.qr(torch.randn(3, 3, generator=rng)).Q
        x = x @ turn / x.norm(dim=1).max()
        out.append(x + noise * torch.randn(points, 3, generator=rng))
    return Clouds(torch.stack(out), y)

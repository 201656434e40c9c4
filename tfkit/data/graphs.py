"""Graphs: four real ones from sociology, and generated ones whose answer is known. Adjacency matrices are dense."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tfkit.data._base import at_least, between, generator, one_of

__all__ = ["GRAPHS", "Graph", "Graphs", "communities", "cycle_pair", "graph", "skip_links", "triangles"]

# name: (function of networkx, attribute of a node that is its label, what it is)
GRAPHS = {
    "karate": ("karate_club_graph", "club", "34 members; weights count shared activities, labels: who they followed"),
    "miserables": ("les_miserables_graph", None, "77 characters of a novel; weights count common chapters"),
    "davis": ("davis_southern_women_graph", "bipartite", "18 women (label 0) and 14 events (1) that they attended"),
    "florentine": ("florentine_families_graph", None, "15 families of Florence, edges are marriages"),
}


class Graph(NamedTuple):
    """One undirected graph: symmetric weights (n, n), a label for each node (-1 where there is none), their names."""

    adjacency: Float[Tensor, "n n"]
    labels: Int[Tensor, "n"]
    names: tuple[str, ...]


class Graphs(NamedTuple):
    """Many graphs of n nodes: symmetric 0 or 1 (b, n, n), and the known answer for each node (b, n)."""

    adjacency: Float[Tensor, "b n n"]
    labels: Int[Tensor, "b n"]


def graph(name: str = "karate") -> Graph:
    """A real graph stored inside networkx; `GRAPHS` lists them. Raises ValueError for another name."""
    one_of("graph", name, GRAPHS)
    import networkx as nx

    function, label, _ = GRAPHS[name]
    found = getattr(nx, function)()
    values = [found.nodes[node].get(label) for node in found]
    order = sorted({v for v in values if v is not None}, key=values.index)
    labels = torch.tensor([order.index(v) if v is not None else -1 for v in values])
    adjacency = torch.tensor(nx.to_numpy_array(found), dtype=torch.float32)
    return Graph(adjacency, labels, tuple(str(node) for node in found))


def _undirected(draw: Tensor, probability: Tensor | float) -> Tensor:
    upper = (draw < probability).float().triu(1)
    return upper + upper.transpose(-1, -2)


def communities(
    count: int, nodes: int = 32, groups: int = 2, inside: float = 0.5, across: float = 0.05, seed: int = 0
) -> Graphs:
    """The stochastic block model: an edge has probability `inside` a group, `across` groups; the label is the group.

    Groups are of equal size up to one node, in random order. Raises ValueError for probabilities outside 0 to 1.
    """
    at_least(1, count=count, groups=groups)
    at_least(groups, nodes=nodes)
    between(0, 1, inside=inside, across=across)
    rng = generator(seed)
    labels = (torch.arange(nodes) % groups)[torch.rand(count, nodes, generator=rng).argsort(1)]  # (b, n)
    same = labels.unsqueeze(1) == labels.unsqueeze(2)
    chance = torch.where(same, inside, across)
    return Graphs(_undirected(torch.rand(count, nodes, nodes, generator=rng), chance), labels)


def triangles(count: int, nodes: int = 16, chance: float = 0.25, seed: int = 0) -> Graphs:
    """Random graphs, each edge with probability `chance`; labels count the triangles at a node, (A^3)_ii / 2."""
    at_least(1, count=count, nodes=nodes)
    between(0, 1, chance=chance)
    a = _undirected(torch.rand(count, nodes, nodes, generator=generator(seed)), chance)
    return Graphs(a, ((a @ a @ a).diagonal(dim1=1, dim2=2) / 2).round().long())


def cycle_pair(length: int = 3) -> Graphs:
    """One cycle of 2 * length nodes, and two cycles of `length`; the labels are how many cycles the graph has.

    Message passing cannot tell them apart: every node of both has two neighbors that look like itself.
    """
    at_least(3, length=length)
    n, a = torch.arange(2 * length), torch.zeros(2, 2 * length, 2 * length)
    a[0, n, (n + 1) % (2 * length)] = 1
    a[1, n, n // length * length + (n + 1) % length] = 1
    return Graphs((a + a.mT).clamp(max=1), torch.tensor([[1], [2]]).repeat(1, 2 * length))


def skip_links(nodes: int = 11, skips: tuple[int, ...] = (2, 3)) -> Graphs:
    """For each skip, a cycle with an edge from each node to the one `skip` further; the labels are the skips.

    All have degree 4 and look alike to message passing, whether isomorphic or not. Raises ValueError for a skip below
    2 or not below nodes / 2. Source: "Relational Pooling for Graph Representations", 2019.
    """
    n, a = torch.arange(nodes), torch.zeros(len(skips), nodes, nodes)
    for k, skip in enumerate(skips):
        if not 2 <= skip < nodes / 2:
            raise ValueError(f"a skip must be at least 2 and below nodes / 2 = {nodes / 2:g}, got {skip}")
        a[k, n, (n + 1) % nodes] = a[k, n, (n + skip) % nodes] = 1
    return Graphs((a + a.mT).clamp(max=1), torch.tensor(skips).unsqueeze(1).repeat(1, nodes))

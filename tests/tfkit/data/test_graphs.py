"""Graphs: published sizes, and answers against networkx and against counting by hand."""

import itertools

import networkx as nx
import pytest
import torch

from tfkit import data as D


@pytest.mark.parametrize("name, nodes, edges", [
    ("karate", 34, 78), ("miserables", 77, 254), ("davis", 32, 89), ("florentine", 15, 20),
])  # fmt: skip
def test_real_graphs(name, nodes, edges):
    g = D.graph(name)
    assert g.adjacency.shape == (nodes, nodes) and len(g.names) == len(g.labels) == nodes
    assert torch.equal(g.adjacency, g.adjacency.T) and g.adjacency.diagonal().sum() == 0
    assert int((g.adjacency > 0).sum()) == 2 * edges


def test_what_the_real_graphs_say():
    karate = D.graph("karate")
    assert karate.labels[0] == 0 and karate.labels[33] == 1 and karate.labels.bincount().tolist() == [17, 17]
    assert karate.adjacency.max() == 7 and int((karate.adjacency[33] > 0).sum()) == 17
    davis = D.graph("davis")
    assert davis.labels.bincount().tolist() == [18, 14]
    same = davis.labels[:, None] == davis.labels
    assert davis.adjacency[same].sum() == 0  # women meet events only
    medici = D.graph("florentine")
    assert medici.names[int(medici.adjacency.sum(1).argmax())] == "Medici" and set(medici.labels.tolist()) == {-1}


def test_communities():
    g = D.communities(40, nodes=30, groups=3, inside=0.6, across=0.1)
    assert torch.equal(g.adjacency, g.adjacency.mT) and g.adjacency.diagonal(dim1=1, dim2=2).sum() == 0
    assert all(row.bincount().tolist() == [10, 10, 10] for row in g.labels) and set(g.adjacency.unique().tolist()) == {
        0,
        1,
    }
    same = (g.labels.unsqueeze(1) == g.labels.unsqueeze(2)) & ~torch.eye(30, dtype=torch.bool)
    assert abs(float(g.adjacency[same].mean()) - 0.6) < 0.02
    assert abs(float(g.adjacency[g.labels.unsqueeze(1) != g.labels.unsqueeze(2)].mean()) - 0.1) < 0.01
    assert torch.equal(g.adjacency, D.communities(40, 30, 3, 0.6, 0.1).adjacency)
    assert not torch.equal(g.labels, D.communities(40, 30, 3, 0.6, 0.1, seed=1).labels)


def test_triangles_by_counting():
    g = D.triangles(5, nodes=9, chance=0.5)
    for a, labels in zip(g.adjacency.tolist(), g.labels.tolist(), strict=True):
        count = [0] * 9
        for i, j, k in itertools.combinations(range(9), 3):
            if a[i][j] and a[j][k] and a[i][k]:
                for node in (i, j, k):
                    count[node] += 1
        assert labels == count
    assert g.labels.sum() > 0 and torch.equal(g.labels, D.triangles(5, 9, 0.5).labels)


def colors(adjacency):
    """Refinement of colors (Weisfeiler and Leman), the limit of message passing: the sorted colors in the end."""
    color = [0] * len(adjacency)
    for _ in range(len(adjacency)):
        color = [
            hash((color[i], tuple(sorted(color[j] for j in row.nonzero()[:, 0].tolist()))))
            for i, row in enumerate(adjacency)
        ]
    return sorted(color)


@pytest.mark.parametrize("length", [3, 4, 7])
def test_a_pair_that_message_passing_cannot_tell_apart(length):
    one, two = (g := D.cycle_pair(length)).adjacency
    assert colors(one) == colors(two)
    assert [nx.number_connected_components(nx.from_numpy_array(a.numpy())) for a in (one, two)] == [1, 2]
    assert g.labels[:, 0].tolist() == [1, 2] and one.sum(1).unique().tolist() == two.sum(1).unique().tolist() == [2]
    triangles = torch.linalg.matrix_power(two, 3).trace() / 6
    assert triangles == (2 if length == 3 else 0)


def test_skip_links():
    g = D.skip_links(11, (2, 3, 4, 5))
    assert g.adjacency.sum(2).unique().tolist() == [4]
    graphs = [nx.from_numpy_array(a.numpy()) for a in g.adjacency]
    alike = [[nx.is_isomorphic(a, b) for b in graphs] for a in graphs]
    assert not alike[0][1] and alike[0][3]  # skips 2 and 3 differ, 2 and 5 do not: 5 times 2 is -1 modulo 11
    assert colors(g.adjacency[0]) == colors(g.adjacency[1])

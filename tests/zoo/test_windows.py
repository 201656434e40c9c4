"""Chapter 24: swin, on random shapes and seeds."""

import pytest
import torch

from tfkit.zoo.windows import windows


@pytest.mark.parametrize("seed, n, m, e, c", [(0, 1, 1, 1, 1), (1, 5, 7, 4, 3), (2, 8, 3, 2, 6)])
def test_swin_is_its_formula(seed, n, m, e, c):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64) for shape in ((n, e), (m, e), (m, c))
    )
    found = windows(q, k, v)
    for i in range(n):
        weights = torch.stack([(q[..., i, :] * k[..., j, :]).sum(-1) ** 2 for j in range(m)], -1)  # (b, h, m)
        expected = sum(weights[..., j, None] * v[..., j, :] for j in range(m)) / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(found[..., i, :], expected)

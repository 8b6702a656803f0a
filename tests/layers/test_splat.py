"""The reverse of bilinear sampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade.layers.splat import splat


@pytest.mark.parametrize("grid", [(3, 7), (5, 2)])
def test_is_the_reverse_of_sampling(grid):
    """What a map is worth at the places that were looked at is the same from either side, outside of it included."""
    torch.manual_seed(0)
    locations = torch.rand(2, 4, 5, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, 4, 5, dtype=torch.float64)
    field = torch.randn(2, 1, *grid, dtype=torch.float64)
    sampled = F.grid_sample(field, locations * 2 - 1, align_corners=False)[:, 0]  # (B, Q, P)
    found = (splat(locations, weights, grid) * field).sum(dim=(2, 3))
    torch.testing.assert_close(found, (sampled * weights).sum(dim=-1), rtol=0, atol=1e-12)


def test_kinds_of_numbers_may_differ():
    """Under autocast weights are coarser than places."""
    torch.manual_seed(0)
    locations, weights = torch.rand(1, 2, 3, 2), torch.rand(1, 2, 3).bfloat16()
    for places in (locations, locations.bfloat16().float()):
        assert torch.equal(splat(places, weights, (4, 4)), splat(places, weights.float(), (4, 4)))
    assert splat(locations.bfloat16(), weights, (4, 4)).dtype == torch.float32

"""From the few points that queries looked at to maps, for explanations."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def splat(
    locations: Float[Tensor, "B Q P 2"], weights: Float[Tensor, "B Q P"], grid: tuple[int, int]
) -> Float[Tensor, "B Q h w"]:
    """Each weight is shared among the four cells around its place: the reverse of bilinear sampling.

    Locations are (x, y) as shares of the picture; what lies outside it is not on the map. A map sums to the weights
    that are inside.
    """
    h, w = grid
    B, Q, P = weights.shape
    exact = torch.promote_types(locations.dtype, torch.float32)  # under autocast they may be of two kinds
    locations, weights = locations.to(exact), weights.to(exact)
    size = locations.new_tensor((w, h))
    places = locations * size - 0.5
    corner = places.floor()
    maps = weights.new_zeros(B * Q, h * w)
    for down in (0, 1):
        for right in (0, 1):
            cell = corner + corner.new_tensor((right, down))
            share = (1 - (places - cell).abs()).prod(dim=-1) * weights  # (B, Q, P)
            inside = ((cell >= 0) & (cell < size)).all(dim=-1)
            index = torch.where(inside, cell[..., 1] * w + cell[..., 0], torch.zeros_like(share)).long()
            maps.scatter_add_(1, index.view(B * Q, P), torch.where(inside, share, 0.0).view(B * Q, P))
    return maps.view(B, Q, h, w)

"""Where a token lies: learned, sinusoidal and rotary positions for any grid, height and width independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_1d(length: int, dim: int, *, base: float = 10_000.0, device: torch.device | None = None) -> Tensor:
    """(length, dim): sines in the first half of the channels, cosines in the second; https://arxiv.org/abs/1706.03762."""
    if dim % 2:
        raise ValueError(f"sinusoidal positions need an even width, not {dim}")
    # in float64, because in float32 far places are off by as much as 1e-4
    rates = base ** -(torch.arange(dim // 2, dtype=torch.float64) / max(1, dim // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(device, torch.float32)


def sinusoidal_2d(
    grid: tuple[int, int], dim: int, *, base: float = 10_000.0, device: torch.device | None = None
) -> Tensor:
    """(h * w, dim): half of the channels for the row, half for the column, row-major."""
    if dim % 4:
        raise ValueError(f"sinusoidal 2-D positions need a width that is a multiple of 4, not {dim}")
    h, w = grid
    rows = sinusoidal_1d(h, dim // 2, base=base, device=device)[:, None].expand(h, w, -1)
    columns = sinusoidal_1d(w, dim // 2, base=base, device=device)[None].expand(h, w, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def sinusoidal_2d_of_shares(
    grid: tuple[int, int],
    dim: int,
    *,
    offset: float = 0.0,
    base: float = 10_000.0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(h * w, dim): as `sinusoidal_2d`, but of shares of a full turn, one turn for the picture's height and width.

    Sines and cosines alternate, as in DETR (https://arxiv.org/abs/2005.12872), whose code counts rows from one. An
    `offset` of a half counts from the middle of the first one (https://arxiv.org/abs/2010.04159).
    """
    if dim % 4:
        raise ValueError(f"sinusoidal 2-D positions need a width that is a multiple of 4, not {dim}")
    h, w = grid
    rows, columns = (
        sinusoidal_of_shares((torch.arange(1, n + 1, dtype=dtype, device=device) - offset) / (n + 1e-6), dim // 2, base)
        for n in grid
    )
    return torch.cat((rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)), dim=-1).flatten(0, 1)


def sinusoidal_of_shares(shares: Float[Tensor, "*N"], dim: int, base: float = 10_000.0) -> Float[Tensor, "*N D"]:
    """Sines and cosines in turn, of shares of a full turn; in the precision of `shares`."""
    rates = base ** -(torch.arange(dim // 2, dtype=shares.dtype, device=shares.device) / (dim // 2))
    angles = 2 * math.pi * shares[..., None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Resize:
    """How a table of positions is brought to another grid; always bicubic. With an `offset`, the cells of the new grid
    lie as if it were that much larger, which the first DINO did to be safe from rounding, and DINOv2 kept."""

    antialias: bool
    offset: float = 0.0


RESIZES = {
    "antialias": Resize(antialias=True),
    "bicubic": Resize(antialias=False),
    "offset": Resize(antialias=False, offset=0.1),
}


class LearnedPositions(nn.Module):
    """A vector per cell of a grid; another grid is interpolated, so that any picture shape can be read."""

    def __init__(self, grid: tuple[int, int], dim: int, resize: str = "antialias"):
        super().__init__()
        self.grid = grid
        self.resize = resize
        self.table = nn.Parameter(torch.empty(grid[0] * grid[1], dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "N C"]:
        return self.table if grid == self.grid else resize_positions(self.table, self.grid, grid, self.resize)


def resize_positions(
    table: Float[Tensor, "N C"], old: tuple[int, int], new: tuple[int, int], resize: str = "antialias"
) -> Float[Tensor, "M C"]:
    """Interpolate positions of a grid to another, in float32 or better. `resize` is one of `RESIZES`."""
    how = RESIZES[resize]
    image = table.to(torch.promote_types(table.dtype, torch.float32)).T.unflatten(1, old)[None]  # (1, C, h, w)
    if how.offset:
        scale = [(n + how.offset) / o for n, o in zip(new, old, strict=True)]
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=how.antialias)
    else:
        image = F.interpolate(image, size=new, mode="bicubic", antialias=how.antialias)
    return image[0].flatten(1).T.to(table.dtype)


def rotary_2d(
    grid: tuple[int, int],
    head_dim: int,
    *,
    prefix: int = 0,
    base: float = 100.0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (prefix + h * w, head_dim), for `rotate`; https://arxiv.org/abs/2104.09864 in two axes.

    Half of the angles come from the row and half from the column, measured from -1 to 1 over the picture, so that a
    larger grid interpolates, as in DINOv3 (https://arxiv.org/abs/2508.10104). The first `prefix` tokens (class token,
    registers) are not turned.
    """
    if head_dim % 4:
        raise ValueError(f"rotary 2-D positions need a head width that is a multiple of 4, not {head_dim}")
    rates = base ** -(torch.arange(head_dim // 4, dtype=dtype, device=device) / (head_dim // 4))
    axes = [2 * (torch.arange(n, dtype=dtype, device=device) + 0.5) / n - 1 for n in grid]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    angles = 2 * math.pi * torch.cat([axis.flatten()[:, None] * rates for axis in (rows, columns)], dim=-1)
    angles = F.pad(torch.cat((angles, angles), dim=-1), (0, 0, prefix, 0))  # (prefix + N, D)
    return angles.cos(), angles.sin()

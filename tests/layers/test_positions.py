from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saccade.layers.attention import rotate
from saccade.layers.positions import LearnedPositions, resize_positions, rotary_2d, sinusoidal_1d, sinusoidal_2d

GRIDS = [(4, 4), (3, 7), (9, 2), (1, 1), (1, 5)]


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_sinusoidal_is_the_papers_formula():
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(the same); ours holds all sines, then all cosines."""
    length, dim = 50, 16
    table = sinusoidal_1d(length, dim)
    for pos in range(length):
        for i in range(dim // 2):
            angle = pos / 10_000 ** (2 * i / dim)
            # measured 5.0e-7, as angles up to 49 are rounded to float32
            assert abs(table[pos, i].item() - math.sin(angle)) <= 3e-6
            assert abs(table[pos, dim // 2 + i].item() - math.cos(angle)) <= 3e-6


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sinusoidal_2d_is_the_row_then_the_column(grid):
    h, w = grid
    table = sinusoidal_2d(grid, 16)
    assert table.shape == (h * w, 16)
    rows, columns = sinusoidal_1d(h, 8), sinusoidal_1d(w, 8)
    for r in range(h):
        for c in range(w):
            assert torch.equal(table[r * w + c], torch.cat((rows[r], columns[c])))
    assert len(table.unique(dim=0)) == h * w  # no two places alike


def test_sinusoidal_refuses_widths_it_cannot_fill():
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sinusoidal_2d((2, 2), 6)
    with pytest.raises(ValueError, match="even width, not 7"):
        sinusoidal_1d(4, 7)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rotary_turns_by_angles_and_leaves_the_prefix(grid, prefix):
    torch.manual_seed(0)
    patches = grid[0] * grid[1]
    N = prefix + patches
    cos, sin = rotary_2d(grid, 8, prefix=prefix)
    assert cos.shape == sin.shape == (N, 8)
    assert gap(cos**2 + sin**2, torch.ones(N, 8)) <= 1e-6  # measured 1.2e-7
    x = torch.randn(2, 3, N, 8)
    turned = rotate(x, (cos, sin))
    assert torch.equal(turned[:, :, :prefix], x[:, :, :prefix])
    assert gap(turned.norm(dim=-1), x.norm(dim=-1)) <= 2e-6  # measured 4.8e-7: a rotation
    if patches > 1:
        assert gap(turned, x) > 0.1
    # the first tokens alone, as the last block asks for them
    assert torch.equal(rotate(x[:, :, :1], (cos, sin)), turned[:, :, :1])


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (9, 2)], ids=str)
def test_rotary_scores_depend_on_the_offset_alone(grid):
    torch.manual_seed(0)
    h, w = grid
    tables = rotary_2d(grid, 8)
    q, k = (torch.randn(8).expand(1, 1, h * w, 8) for _ in range(2))
    scores = (rotate(q, tables) @ rotate(k, tables).transpose(-2, -1))[0, 0].unflatten(1, grid).unflatten(0, grid)
    by_offset: dict[tuple[int, int], list[float]] = {}
    for r in range(h):
        for c in range(w):
            for r2 in range(h):
                for c2 in range(w):
                    by_offset.setdefault((r2 - r, c2 - c), []).append(scores[r, c, r2, c2].item())
    spread = max(max(values) - min(values) for values in by_offset.values())
    assert spread <= 1e-5  # measured 2.1e-6
    means = torch.tensor([sum(values) / len(values) for values in by_offset.values()])
    assert means.std() > 0.1


def test_rotary_on_another_grid_means_the_same_place():
    """The cell in the middle of three lies where the one cell lay."""
    coarse, fine = (
        torch.stack(rotary_2d(grid, 8)).unflatten(1, grid)  # (2, h, w, D)
        for grid in ((3, 5), (9, 15))
    )
    assert gap(fine[:, 1::3, 1::3], coarse) <= 5e-6  # measured 0
    tall = torch.stack(rotary_2d((9, 5), 8)).unflatten(1, (9, 5))
    assert gap(tall[:, 1::3], coarse) <= 5e-6  # measured 0: height alone, independent of width


def test_rotary_refuses_widths_it_cannot_split():
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        rotary_2d((2, 2), 6)


def test_learned_positions_at_their_own_grid_are_the_table():
    positions = LearnedPositions((3, 5), 8)
    assert positions((3, 5)) is positions.table


@pytest.mark.parametrize("grid", [(6, 10), (2, 3), (5, 3), (3, 9), (1, 1)], ids=str)
def test_learned_positions_on_another_grid(grid):
    torch.manual_seed(0)
    positions = LearnedPositions((3, 5), 8)
    resized = positions(grid)
    assert resized.shape == (grid[0] * grid[1], 8)
    resized.sum().backward()
    # Every cell takes part; a new cell's weights sum to one, so all gradients sum to the number of new cells.
    assert positions.table.grad is not None and (positions.table.grad != 0).all()
    assert abs(positions.table.grad.sum().item() / (8 * grid[0] * grid[1]) - 1) <= 1e-5  # measured 7.9e-8


def test_resizing_keeps_what_is_constant_and_does_not_mix_axes():
    old, new = (4, 6), (7, 9)
    constant = torch.full((24, 2), 3.0)
    assert gap(resize_positions(constant, old, new), torch.full((63, 2), 3.0)) <= 1e-5  # measured 2.4e-7
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    resized = resize_positions(torch.stack((row, column), dim=-1).flatten(0, 1), old, new).unflatten(0, new)
    assert gap(resized[:, :1, 0].expand(7, 9), resized[..., 0]) <= 1e-5  # measured 2.4e-7
    assert gap(resized[:1, :, 1].expand(7, 9), resized[..., 1]) <= 1e-5  # measured 4.8e-7
    assert (resized[:, 0, 0].diff() > 0).all() and (resized[0, :, 1].diff() > 0).all()


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75, as PyTorch has it without antialiasing."""
    x, a = np.abs(x), -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic_matrix(old: int, new: int, scale: float) -> np.ndarray:
    """(new, old): how much of each old cell is in each new one, where a new cell is 1 / scale of an old one wide."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) / scale - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += cubic(np.array(centre - tap))
    return matrix


@pytest.mark.parametrize("new", [(7, 9), (3, 4), (5, 2), (14, 21)], ids=str)
@pytest.mark.parametrize(("resize", "offset"), [("bicubic", 0.0), ("offset", 0.1)])
def test_resizing_by_the_formula(new, resize, offset):
    """The offset makes the scale (n + 0.1) / old, as in the code of DINO and DINOv2, and not the size."""
    old = (4, 6)
    table = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = (bicubic_matrix(o, n, (n + offset) / o) for o, n in zip(old, new, strict=True))
    expected = np.einsum("ih,jw,hwc->ijc", rows, columns, table.unflatten(0, old).numpy())
    resized = resize_positions(table, old, new, resize)
    assert gap(resized, torch.from_numpy(expected).flatten(0, 1)) <= 1e-12  # measured 1.2e-14


def test_antialiasing_differs_where_the_grid_shrinks():
    table = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    smaller, larger = (
        [resize_positions(table, (8, 8), new, how) for how in ("antialias", "bicubic")] for new in ((3, 3), (12, 12))
    )
    assert gap(*smaller) > 0.1
    assert gap(*larger) > 0.01  # another kernel: a = -0.5 with antialiasing


def test_rotary_in_float64_is_exact():
    rough, fine = rotary_2d((5, 7), 16, prefix=2), rotary_2d((5, 7), 16, prefix=2, dtype=torch.float64)
    for a, b in zip(rough, fine, strict=True):
        assert b.dtype == torch.float64 and 0 < gap(a.double(), b) <= 2e-6  # measured 3.2e-7
    angle = 2 * math.pi * (2 * 3.5 / 5 - 1) * 100 ** -(1 / 4)  # the second rate of the fourth row
    assert abs(fine[0][2 + 3 * 7, 1].item() - math.cos(angle)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resizing_keeps_the_type(dtype):
    assert resize_positions(torch.zeros(4, 3, dtype=dtype), (2, 2), (3, 3)).dtype == dtype

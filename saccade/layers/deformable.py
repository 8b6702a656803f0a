"""Deformable attention: a query looks at a few points of several feature maps: https://arxiv.org/abs/2010.04159.

Every head of a query reads K points between the cells of the maps: some of the first level, some of the second, and so
on, as `points` says. Levels lie one after the other in the tokens, row by row. Outside its map a level is zero.

What a head gives is a weighted sum of rows of its values, four for each point, and the gradient of the values is such a
sum of rows of the output's gradient. On processors PyTorch's embedding bags make both. The gradients of weights and
places are made of products of two rows each, which its sampled matrix product gives. None of them writes down the
rows that it reads. `grid_sample` does, and most of its time goes into asking the system for that memory.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from saccade.layers.linear import Linear, linear

Shapes = Sequence[tuple[int, int]]  # (height, width) of each level

MARGIN = 2  # zero cells around a level: two, so that a point far outside reads only zeros and has no gradient
POINTS_AT_ONCE = 2**17  # for each thread; what is made of them has to stay in its cache
CELLS_AT_ONCE = 2**15 - 1  # numbers of 16 bits are sorted in half the time
SPARSE = 4  # points for a cell: below, four times as many corners are sorted, so that sums are made but once


def deformable_sampling(
    values: Float[Tensor, "B N H D"],
    shapes: Shapes,
    points: Sequence[int],
    locations: Float[Tensor, "B Q H K 2"],
    weights: Float[Tensor, "B Q H K"],
) -> Float[Tensor, "B Q C"]:
    """Weighted sums of values at `locations` (x, y), which go from 0 to 1 across the image. C is H D."""
    check(values, shapes, points, weights)
    size = sizes(shapes, points, locations)
    places = torch.addcmul(size.new_tensor(MARGIN - 0.5), locations.movedim(-1, 2), size[:, None])
    return sample(values, shapes, points, places, weights)


def sample(
    values: Float[Tensor, "B N H D"],
    shapes: Shapes,
    points: Sequence[int],
    places: Float[Tensor, "B Q 2 H K"],
    weights: Float[Tensor, "B Q H K"],
) -> Float[Tensor, "B Q C"]:
    """The same at places (x, y) in cells of their level, the middle of whose first cell is at (MARGIN, MARGIN)."""
    check(values, shapes, points, weights)
    shapes, points = tuple((int(h), int(w)) for h, w in shapes), tuple(points)
    dtype = torch.promote_types(values.dtype, torch.float32)
    wide, places, weights = values.to(dtype), places.to(dtype), weights.to(dtype)
    if values.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return sample_by_grid(wide, shapes, points, places, weights).to(values.dtype)
    return SampleByBags.apply(wide, shapes, points, places, weights).to(values.dtype)  # type: ignore[union-attr]


def check(values: Tensor, shapes: Shapes, points: Sequence[int], weights: Tensor) -> None:
    N, K = values.shape[1], weights.shape[-1]
    if sum(h * w for h, w in shapes) != N:
        raise ValueError(f"{N} tokens are not those of levels of {', '.join(f'{h} x {w}' for h, w in shapes)}")
    if len(points) != len(shapes) or sum(points) != K:
        raise ValueError(f"points {tuple(points)} of {len(shapes)} levels do not fit the {K} weights of a head")


def sizes(shapes: Shapes, points: Sequence[int], like: Tensor) -> Float[Tensor, "2 K"]:
    """Width and height of the level of each point."""
    return like.new_tensor([(w, h) for (h, w), count in zip(shapes, points, strict=True) for _ in range(count)]).T


def sample_by_grid(values: Tensor, shapes: Shapes, points: Sequence[int], places: Tensor, weights: Tensor) -> Tensor:
    """`sample` through `grid_sample`: on accelerators, and where a graph is recorded."""
    B, _, H, _ = values.shape
    grid = (places - (MARGIN - 0.5)) * (2 / sizes(shapes, points, places)[:, None]) - 1
    grids = grid.permute(0, 3, 1, 4, 2).flatten(0, 1).split(list(points), dim=2)  # (B H, Q, P, 2) of each level
    levels = values.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], dim=-1)  # (B H, D, h w)
    sampled = [
        F.grid_sample(level.unflatten(-1, shape), of_level, padding_mode="zeros", align_corners=False)
        for level, shape, of_level in zip(levels, shapes, grids, strict=True)
    ]
    mixed = (torch.cat(sampled, dim=-1) * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(dim=-1)  # (B H, D, Q)
    return mixed.unflatten(0, (B, H)).permute(0, 3, 1, 2).flatten(2)


@dataclass(frozen=True)
class Sheet:
    """All levels on one sheet of cells, where the same shift leads from any cell to the one below.

    Between them are zeros for the margins. The margin at the end of a row may be the one before the next row.
    """

    shapes: tuple[tuple[int, int], ...]
    corners: tuple[tuple[int, int], ...]  # row and column of the first cell of each level
    rows: int
    stride: int  # cells of a row
    zeroth: Tensor  # (K,) the cell at place (0, 0) of the level of each point
    last: Tensor  # (2, 1, 1, K) the place in the margin behind the level, where points from beyond are moved

    @property
    def cells(self) -> int:
        return self.rows * self.stride

    @property
    def shifts(self) -> tuple[int, int, int, int]:
        """From a cell to those a point lies between: itself, its right neighbour, the one below, and that one's."""
        return 0, 1, self.stride, self.stride + 1

    def levels(self, sheets: Float[Tensor, "B H cells D"]) -> Iterator[Float[Tensor, "B h w H D"]]:
        """Views of the levels."""
        grid = sheets.unflatten(2, (self.rows, self.stride)).permute(0, 2, 3, 1, 4)
        for (h, w), (row, column) in zip(self.shapes, self.corners, strict=True):
            yield grid[:, row : row + h, column : column + w]

    def lay(self, values: Float[Tensor, "B N H D"]) -> Float[Tensor, "B H cells D"]:
        B, _, H, D = values.shape
        sheets = values.new_zeros(B, H, self.cells, D)
        for level, part in zip(self.levels(sheets), self.split(values), strict=True):
            level.copy_(part)
        return sheets

    def take(self, sheets: Float[Tensor, "B H cells D"]) -> Float[Tensor, "B N H D"]:
        B, H, _, D = sheets.shape
        values = sheets.new_empty(B, sum(h * w for h, w in self.shapes), H, D)
        for level, part in zip(self.levels(sheets), self.split(values), strict=True):
            part.copy_(level)
        return values

    def split(self, values: Float[Tensor, "B N H D"]) -> Iterator[Float[Tensor, "B h w H D"]]:
        for part, shape in zip(values.split([h * w for h, w in self.shapes], dim=1), self.shapes, strict=True):
            yield part.unflatten(1, shape)


@functools.lru_cache(maxsize=64)
def sheet_of(shapes: tuple[tuple[int, int], ...], points: tuple[int, ...]) -> Sheet:
    """Levels from left to right as long as there is room, then below."""
    stride = max(w for _, w in shapes) + MARGIN
    corners, of_points = [], []
    row = end = MARGIN
    column = MARGIN
    for (h, w), count in zip(shapes, points, strict=True):
        if column + w > stride:
            row, column = end, MARGIN
        corners.append((row, column))
        of_points += count * [((row - MARGIN) * stride + column - MARGIN, w + MARGIN, h + MARGIN)]
        end, column = max(end, row + h + MARGIN), column + w + MARGIN
    with torch.inference_mode(False):  # these outlive the call
        zeroth, *last = torch.tensor(of_points, dtype=torch.int32).T.contiguous()
        return Sheet(shapes, tuple(corners), end + 1, stride, zeroth, torch.stack(last)[:, None, None])


class Block:
    """Points of some heads of some images, each of which has a sheet of its own; together R of them."""

    def __init__(self, sheet: Sheet, values: Tensor, places: Tensor, weights: Tensor):
        B, Q, H, K = weights.shape
        self.shape = (B, H, Q, K)
        self.sheet = sheet
        # laid anew for each block and pass, because sheets are read here and there, which is fast only in the cache
        self.cells = sheet.lay(values).flatten(0, 2)  # (R cells, D)
        place = places.permute(2, 0, 3, 1, 4).contiguous().view(2, B * H, Q, K)
        corner = place.to(torch.int32)  # bounded as whole numbers, so that a NaN finds a cell too
        torch.clamp(corner, torch.zeros_like(sheet.last), sheet.last, out=corner)
        index = torch.add(sheet.zeroth, corner[0]).add_(corner[1], alpha=sheet.stride)
        index += torch.arange(0, len(self.cells), sheet.cells, dtype=torch.int32)[:, None, None]
        self.index = index.view(-1)  # the cell to the left and above of each point
        self.x, self.y = place.frac()  # of a point that was moved to a margin they are wrong, and multiply zeros
        self.weights = weights.transpose(1, 2).contiguous().view(B * H, Q, K)
        self.ends = torch.arange(0, self.weights.numel() + 1, K, dtype=torch.int32)

    def shares(self) -> list[Tensor]:
        """The weights of the four cells."""
        lower = self.weights * self.y
        upper = self.weights - lower
        right_upper, right_lower = upper * self.x, lower * self.x
        return [part.view(-1) for part in (upper.sub_(right_upper), right_upper, lower.sub_(right_lower), right_lower)]

    def sample(self) -> Float[Tensor, "B H Q D"]:
        first, *others = (
            sums_of_rows(self.cells[shift:], self.index, self.ends[:-1], share)
            for shift, share in zip(self.sheet.shifts, self.shares(), strict=True)
        )
        for other in others:
            first += other
        return first.view(*self.shape[:3], self.cells.shape[1])

    def gradients_of_points(self, grad: Float[Tensor, "R Q D"], of_places: Tensor, of_weights: Tensor) -> None:
        """Written to `of_places` (B, Q, 2, H, K) and `of_weights` (B, Q, H, K)."""
        products = grad.new_zeros(4, *self.weights.shape)
        quiet_about_sparse_tensors()
        for shift, product in zip(self.sheet.shifts, products, strict=True):
            cells, entries = self.cells[shift:], product.view(-1)
            pairs = torch.sparse_csr_tensor(
                self.ends, self.index, entries, (len(grad), len(cells)), check_invariants=False
            )
            torch.sparse.sampled_addmm(pairs, grad, cells.T, beta=0.0, out=pairs)  # its entries are `product` itself
        left_upper, right_upper, left_lower, right_lower = products
        upper, lower = right_upper.sub_(left_upper), right_lower.sub_(left_lower)  # how fast they change with x
        at_upper, at_lower = left_upper.addcmul_(self.x, upper), left_lower.addcmul_(self.x, lower)
        with_y = at_lower.sub_(at_upper)
        with_x = torch.addcmul(upper, self.y, lower.sub_(upper))
        at_place = at_upper.addcmul_(self.y, with_y)
        of_weights.transpose(1, 2).copy_(at_place.view(self.shape))
        for axis, slope in enumerate((with_x, with_y)):
            of_places[:, :, axis].transpose(1, 2).copy_(slope.mul_(self.weights).view(self.shape))

    def gradient_of_values(self, grad: Float[Tensor, "R Q D"], of_sheets: Tensor) -> None:
        """Written to `of_sheets` (B, H, cells, D): in each cell, the sum over the points that read it."""
        queries = torch.arange(len(grad), dtype=torch.int32)[:, None].expand(-1, self.shape[-1]).reshape(-1)
        index, shares, shifts = self.index, self.shares(), self.sheet.shifts
        if len(index) < SPARSE * len(self.cells):
            index = torch.cat([index + shift for shift in shifts])
            shares, queries, shifts = [torch.cat(shares)], queries.repeat(4), (0,)
        narrow = index.short() if len(self.cells) <= CELLS_AT_ONCE else index
        order = torch.sort(narrow, stable=True).indices  # only the stable sort goes by digits
        counts = torch.bincount(index, minlength=len(self.cells))
        starts = F.pad((counts.cumsum(0) - counts).int(), (shifts[-1], 0))
        queries = queries.index_select(0, order)
        total = of_sheets.view(len(self.cells), -1)
        for shift, share in zip(shifts, shares, strict=True):
            # with `starts` moved, sums appear at the cell that they belong to; the last cells are margin
            moved = starts[shifts[-1] - shift : len(starts) - shift]
            sums = sums_of_rows(grad, queries, moved, share.index_select(0, order))
            total.add_(sums) if shift else total.copy_(sums)


def sums_of_rows(table: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of `table`; those of a sum begin at its number in `starts`."""
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)


@functools.cache
def quiet_about_sparse_tensors() -> None:
    """PyTorch says once in a process that they are in beta. Here they only carry indices to a kernel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))


class SampleByBags(torch.autograd.Function):
    """`sample` on processors, a block of heads after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        shapes: tuple[tuple[int, int], ...],
        points: tuple[int, ...],
        places: Tensor,
        weights: Tensor,
    ) -> Tensor:
        ctx.sheet = sheet = sheet_of(shapes, points)
        ctx.save_for_backward(values, places, weights)
        out = values.new_empty(*weights.shape[:3], values.shape[-1])  # (B, Q, H, D)
        for b, h in blocks(weights, sheet.cells):
            block = Block(sheet, values[b, :, h], places[b, :, :, h], weights[b, :, h])
            out[b, :, h].transpose(1, 2).copy_(block.sample())
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, places, weights = ctx.saved_tensors
        B, _, H, D = values.shape
        sheet: Sheet = ctx.sheet
        wants_values, _, _, *wants_points = ctx.needs_input_grad
        upstream = gradients[0].unflatten(-1, (H, D))  # (B, Q, H, D)
        of_sheets = values.new_empty(B, H, sheet.cells, D) if wants_values else None
        of_places, of_weights = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (places, weights)
        )
        for b, h in blocks(weights, sheet.cells):
            block = Block(sheet, values[b, :, h], places[b, :, :, h], weights[b, :, h])
            grad = upstream[b, :, h].transpose(1, 2).flatten(0, 2).contiguous()
            if any(wants_points):
                block.gradients_of_points(grad, of_places[b, :, :, h], of_weights[b, :, h])
            if of_sheets is not None:
                block.gradient_of_values(grad, of_sheets[b, h])
        of_points = (of_places, of_weights) if any(wants_points) else (None, None)
        return sheet.take(of_sheets) if of_sheets is not None else None, None, None, *of_points


def blocks(weights: Float[Tensor, "B Q H K"], cells: int) -> Iterator[tuple[slice, slice]]:
    """Images and heads to be worked on at once: some heads of an image, or all heads of some images."""
    B, Q, H, K = weights.shape
    most = max(1, min(POINTS_AT_ONCE * torch.get_num_threads() // max(1, Q * K), CELLS_AT_ONCE // cells))
    images, heads = max(1, most // H), max(count for count in range(1, H + 1) if H % count == 0 and count <= most)
    for b in range(0, B, images):
        for h in range(0, H, heads):
            yield slice(b, b + images), slice(h, h + heads)


class DeformableAttention(nn.Module):
    """Attention to a few points of each level around a reference, at offsets that the query itself finds.

    Offsets from a reference point are in cells of the level. Those from the middle of a reference box are in parts of
    it: at one of P points, an offset of P / `reach` is as wide or high as the box.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int | Sequence[int] = 4, *, reach: float = 0.5):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.points = (points,) * levels if isinstance(points, int) else tuple(points)
        if len(self.points) != levels:
            raise ValueError(f"points {self.points} are not one number for each of {levels} levels")
        self.heads, self.reach = heads, reach
        self.value = Linear(dim, dim)
        self.offsets = Linear(dim, heads * sum(self.points) * 2)  # (H, K, 2)
        self.weights = Linear(dim, heads * sum(self.points))
        self.out = Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head begins to look in a direction of its own, with its n-th point n cells away, all weights equal."""
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        nn.init.zeros_(self.offsets.weight)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions /= directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.cat([torch.arange(1.0, count + 1) for count in self.points])
        with torch.no_grad():
            self.offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())

    def forward(
        self,
        query: Float[Tensor, "B Q C"],
        reference: Float[Tensor, "B Q R"] | Float[Tensor, "B Q L R"],
        source: Float[Tensor, "B N C"],
        shapes: Shapes,
    ) -> Float[Tensor, "B Q C"]:
        """`query` has its positions added. `source` are the tokens of all levels, of `shapes` (height, width).

        A reference, in parts of the image, is a point (x, y) or a box (x, y of its middle, width, height); the same
        for all levels or one for each.
        """
        places, weights = self.look(query, reference, shapes)
        values = self.value(source).unflatten(-1, (self.heads, -1))
        return self.out(sample(values, shapes, self.points, places, weights))

    def with_weights(
        self,
        query: Float[Tensor, "B Q C"],
        reference: Float[Tensor, "B Q R"] | Float[Tensor, "B Q L R"],
        source: Float[Tensor, "B N C"],
        shapes: Shapes,
    ) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q H K 2"], Float[Tensor, "B Q H K"]]:
        """`forward`, for explanations: also where in the image, from 0 to 1, each head looked, and the weights."""
        places, weights = self.look(query, reference, shapes)
        values = self.value(source).unflatten(-1, (self.heads, -1))
        mixed = self.out(sample(values, shapes, self.points, places, weights))
        locations = (places - (MARGIN - 0.5)) / sizes(shapes, self.points, places)[:, None]
        return mixed, locations.movedim(2, -1), weights

    def look(
        self, query: Tensor, reference: Tensor, shapes: Shapes
    ) -> tuple[Float[Tensor, "B Q 2 H K"], Float[Tensor, "B Q H K"]]:
        """Places, as `sample` takes them, and weights."""
        H, K = self.heads, sum(self.points)
        weights = self.weights(query).unflatten(-1, (H, K)).softmax(dim=-1)
        # all x before all y: rows of weights are moved, which are fewer than what comes of them
        matrix = self.offsets.weight.unflatten(0, (H * K, 2)).transpose(0, 1).flatten(0, 1)
        offsets = linear(query, matrix, self.offsets.bias.view(-1, 2).T.flatten()).unflatten(-1, (2, H, K))
        reference = reference.to(torch.promote_types(reference.dtype, torch.float32))  # halves are too coarse for it
        of_point = torch.tensor([level for level, count in enumerate(self.points) for _ in range(count)])
        size = sizes(shapes, self.points, reference)  # (2, K)
        if reference.dim() == 3:
            reference = reference[:, :, None].expand(-1, -1, len(self.points), -1)
        reference = reference[:, :, of_point].transpose(-1, -2)  # (B, Q, R, K)
        middle = torch.addcmul(size.new_tensor(MARGIN - 0.5), reference[:, :, :2], size)[:, :, :, None]
        if reference.shape[2] == 2:
            return middle + offsets, weights
        counts = size.new_tensor([count for count in self.points for _ in range(count)])
        extent = reference[:, :, 2:] * (size * (self.reach / counts))
        return torch.addcmul(middle, offsets.to(middle.dtype), extent[:, :, :, None]), weights

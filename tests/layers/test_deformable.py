"""Deformable attention: by hand, and against transformers' code, forward and gradients, by both ways of sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from saccade.layers import deformable
from saccade.layers.deformable import (
    MARGIN,
    DeformableAttention,
    Shapes,
    deformable_sampling,
    sample,
    sample_by_grid,
    sizes,
)

# (levels, points of each, queries)
CASES = {
    "pyramid": ([(12, 9), (6, 5), (3, 2), (1, 1)], [4, 4, 4, 4], 40),
    "few queries": ([(12, 9), (6, 5), (3, 2), (1, 1)], [4, 4, 4, 4], 3),
    "upside down": ([(1, 1), (2, 7), (9, 12)], [1, 3, 2], 50),
    "alike": ([(4, 4), (4, 4), (4, 4)], [2, 2, 2], 30),
    "long": ([(1, 30), (30, 1)], [5, 1], 20),
    "one cell": ([(1, 1)], [3], 6),
}
cases = pytest.mark.parametrize("case", CASES)


def draw(case: str, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations of which many lie outside, and weights, all with gradients."""
    shapes, points, queries = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    heads, width, K = 4, 8, sum(points)
    values = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, generator=generator, dtype=dtype)
    locations = torch.rand(batch, queries, heads, K, 2, generator=generator, dtype=dtype) * 1.8 - 0.4
    weights = torch.randn(batch, queries, heads, K, generator=generator, dtype=dtype)
    return values.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()


def by_hand(values: Tensor, shapes: Shapes, points: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Every point against every cell of its level: the share of a cell falls with the distance to its middle."""
    total = torch.zeros(())
    levels = values.split([h * w for h, w in shapes], dim=1)
    parts = zip(levels, shapes, locations.split(points, dim=3), weights.split(points, dim=3), strict=True)
    for level, (h, w), where, weight in parts:
        x, y = (where * torch.tensor([w, h])).unbind(-1)
        near_x = (1 - (x[..., None] - 0.5 - torch.arange(w)).abs()).clamp(min=0)  # (B, Q, H, P, w)
        near_y = (1 - (y[..., None] - 0.5 - torch.arange(h)).abs()).clamp(min=0)
        total = total + torch.einsum("bqhp,bqhpy,bqhpx,byxhd->bqhd", weight, near_y, near_x, level.unflatten(1, (h, w)))
    return total.flatten(2)


def by_grid(values: Tensor, shapes: Shapes, points: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    size = sizes(shapes, points, locations)
    places = locations.movedim(-1, 2) * size[:, None] + (MARGIN - 0.5)
    return sample_by_grid(values, shapes, points, places, weights)


ways = pytest.mark.parametrize("way", [deformable_sampling, by_grid], ids=["bags", "grid"])


def assert_same(
    ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor], tolerance: float, their_inputs: Sequence[Tensor] = ()
) -> None:
    """Outputs, and gradients of the inputs, relative to the largest number of each."""
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    found = (ours, *torch.autograd.grad(ours, inputs, upstream))
    wanted = (theirs, *torch.autograd.grad(theirs, their_inputs or inputs, upstream))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@ways
@cases
def test_by_hand(case, way):
    shapes, points, _ = CASES[case]
    inputs = draw(case)
    expected = by_hand(inputs[0], shapes, points, *inputs[1:])
    assert_same(way(inputs[0], shapes, points, *inputs[1:]), expected, inputs, 1e-13)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("points_at_once", "cells_at_once", "sparse"), [(1, 1, 0), (1, 10**6, 10**6), (1300, 40000, 4)]
)
def test_any_blocks_give_the_same(monkeypatch, batch, points_at_once, cells_at_once, sparse):
    """Heads one by one, some together, or several images together, with few points to a cell and with many."""
    monkeypatch.setattr(deformable, "POINTS_AT_ONCE", points_at_once)
    monkeypatch.setattr(deformable, "CELLS_AT_ONCE", cells_at_once)
    monkeypatch.setattr(deformable, "SPARSE", sparse)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    shapes, points, _ = CASES["pyramid"]
    inputs = draw("pyramid", batch=batch)
    before = [tensor.detach().clone() for tensor in inputs]
    ours = deformable_sampling(inputs[0], shapes, points, *inputs[1:])
    assert_same(ours, by_hand(inputs[0], shapes, points, *inputs[1:]), inputs, 1e-13)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was written to"


@ways
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@cases
def test_the_same_as_transformers(case, way, dtype, tolerance):
    theirs = pytest.importorskip("transformers.models.rt_detr_v2.modeling_rt_detr_v2")
    shapes, points, _ = CASES[case]
    inputs = draw(case, dtype)
    expected = theirs.multi_scale_deformable_attention_v2(inputs[0], shapes, *inputs[1:], points)
    assert_same(way(inputs[0], shapes, points, *inputs[1:]), expected, inputs, tolerance)


@ways
def test_gradcheck(way):
    shapes, points = [(3, 4), (2, 1)], [2, 1]
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, 14, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(1, 2, 2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    function = lambda *inputs: way(inputs[0], shapes, points, *inputs[1:])  # noqa: E731
    assert torch.autograd.gradcheck(function, (values, locations, weights))


@ways
def test_far_outside_is_nothing(way):
    values, locations, weights = draw("pyramid")
    shapes, points, _ = CASES["pyramid"]
    for far in (-3.0, 3.0, -1e30, 1e30):
        away = locations.detach().clone()
        away[..., 0] = far
        away.requires_grad_()
        out = way(values, shapes, points, away, weights)
        assert not out.any()
        assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), (values, away, weights)))


def test_a_nan_is_passed_on():
    """It must neither end the program nor go unseen by the training loop."""
    values, locations, weights = draw("pyramid", torch.float32)
    shapes, points, _ = CASES["pyramid"]
    with torch.no_grad():
        locations[0, 0, 0, 0, 0] = math.nan
    out = deformable_sampling(values, shapes, points, locations, weights)
    assert out[0, 0].isnan().any() and not out[0, 1:].isnan().any() and not out[1].isnan().any()
    out.sum().backward()


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)])
def test_gradients_of_some_inputs(wanted):
    shapes, points, _ = CASES["pyramid"]
    inputs = draw("pyramid")
    expected = torch.autograd.grad(by_hand(inputs[0], shapes, points, *inputs[1:]).square().sum(), inputs)
    given = [tensor if i in wanted else tensor.detach() for i, tensor in enumerate(inputs)]
    out = deformable_sampling(given[0], shapes, points, *given[1:])
    found = torch.autograd.grad(out.square().sum(), [given[i] for i in wanted])
    for i, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, expected[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_as_floats(dtype):
    values, locations, weights = (tensor.detach() for tensor in draw("pyramid", torch.float32))
    shapes, points, _ = CASES["pyramid"]
    out = deformable_sampling(values.to(dtype), shapes, points, locations, weights)
    exact = deformable_sampling(values.to(dtype).float(), shapes, points, locations, weights)
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype))


def test_no_queries():
    layer = draw_module()
    query, reference, source = draw_tokens("boxes", per_level=False, queries=0)
    out = layer(query, reference, source, LEVELS)
    assert out.shape == (2, 0, DIM)
    out.sum().backward()
    assert source.grad is not None and not source.grad.any()


def test_more_cells_than_numbers_of_16_bits():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 190 * 200, 1, 2, generator=generator, requires_grad=True)
    locations = torch.rand(1, 4, 1, 3, 2, generator=generator, requires_grad=True)
    weights = torch.randn(1, 4, 1, 3, generator=generator, requires_grad=True)
    inputs = values, [(190, 200)], [3], locations, weights
    assert deformable.sheet_of(((190, 200),), (3,)).cells > deformable.CELLS_AT_ONCE
    assert_same(deformable_sampling(*inputs), by_grid(*inputs), (values, locations, weights), 1e-4)


def test_errors_name_what_does_not_fit():
    values, locations, weights = draw("pyramid")
    shapes, points, _ = CASES["pyramid"]
    with pytest.raises(ValueError, match="145 tokens are not those of levels of 12 x 9, 6 x 5"):
        deformable_sampling(values, shapes[:2], points[:2], locations, weights)
    with pytest.raises(ValueError, match=r"points \(4, 4, 4, 3\) of 4 levels do not fit the 16 weights"):
        sample(values, shapes, [4, 4, 4, 3], locations.movedim(-1, 2), weights)
    with pytest.raises(ValueError, match="not a multiple of heads"):
        DeformableAttention(30, 4, 1)
    with pytest.raises(ValueError, match="not one number for each of 2 levels"):
        DeformableAttention(32, 4, 2, [4])


# the module

LEVELS, DIM, HEADS = [(6, 9), (3, 5), (2, 2)], 32, 4
THEIR_NAMES = {
    "value": "value_proj", "offsets": "sampling_offsets", "weights": "attention_weights", "out": "output_proj",
}  # fmt: skip


def draw_module(points: int | list[int] = 4, reach: float = 0.5) -> DeformableAttention:
    torch.manual_seed(0)
    layer = DeformableAttention(DIM, HEADS, len(LEVELS), points, reach=reach).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def draw_tokens(kind: str, per_level: bool, batch: int = 2, queries: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, references and tokens of the levels."""
    torch.manual_seed(1)
    coordinates = {"points": 2, "boxes": 4}[kind]
    query = torch.randn(batch, queries, DIM, dtype=torch.float64, requires_grad=True)
    source = torch.randn(batch, sum(h * w for h, w in LEVELS), DIM, dtype=torch.float64, requires_grad=True)
    levels = (len(LEVELS),) if per_level else ()
    reference = torch.rand(batch, queries, *levels, coordinates, dtype=torch.float64, requires_grad=True)
    return query, reference, source


references = pytest.mark.parametrize(
    ("kind", "per_level"), [("points", False), ("points", True), ("boxes", False), ("boxes", True)]
)


@references
def test_module_is_transformers(kind, per_level):
    theirs = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    layer = draw_module()
    config = SimpleNamespace(d_model=DIM, num_feature_levels=len(LEVELS), disable_custom_kernels=True)
    peer = theirs.DeformableDetrMultiscaleDeformableAttention(config, HEADS, 4).double()
    state = layer.state_dict()
    peer.load_state_dict({theirs: state[ours] for ours, theirs in names_of(layer).items()})
    query, reference, source = inputs = draw_tokens(kind, per_level)
    each = reference if per_level else reference[:, :, None].expand(-1, -1, len(LEVELS), -1)
    expected, _ = peer(
        query, encoder_hidden_states=source, reference_points=each,
        spatial_shapes=torch.tensor(LEVELS), spatial_shapes_list=LEVELS,
    )  # fmt: skip
    parameters = [peer.get_parameter(name) for name in names_of(layer).values()]
    ours = layer(query, reference, source, LEVELS)
    assert_same(ours, expected, (*inputs, *layer.parameters()), 1e-12, (*inputs, *parameters))


def names_of(layer: DeformableAttention) -> dict[str, str]:
    """Our names of the parameters to transformers'."""
    names = [name.split(".") for name, _ in layer.named_parameters()]
    return {f"{module}.{end}": f"{THEIR_NAMES[module]}.{end}" for module, end in names}


@pytest.mark.parametrize("reach", [0.5, 0.25])
def test_other_numbers_of_points_are_transformers(reach):
    """D-FINE has levels of different numbers of points, a reach of its own and no projection of what is looked at."""
    theirs = pytest.importorskip("transformers.models.d_fine.modeling_d_fine")
    points = [3, 6, 2]
    layer = draw_module(points, reach)
    for projection in (layer.value, layer.out):
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)
    config = SimpleNamespace(
        d_model=DIM, decoder_attention_heads=HEADS, num_feature_levels=len(LEVELS),
        decoder_offset_scale=reach, decoder_method="default", decoder_n_points=points,
    )  # fmt: skip
    peer = theirs.DFineMultiscaleDeformableAttention(config).double()
    state = layer.state_dict()
    names = {theirs: ours for ours, theirs in names_of(layer).items() if ours.startswith(("offsets", "weights"))}
    counts = torch.tensor([count for count in points for _ in range(count)], dtype=torch.float64)
    peer.load_state_dict({theirs: state[ours] for theirs, ours in names.items()} | {"num_points_scale": 1 / counts})
    query, reference, source = inputs = draw_tokens("boxes", per_level=False)
    expected, _ = peer(
        query, reference_points=reference[:, :, None], encoder_hidden_states=source,
        spatial_shapes=torch.tensor(LEVELS), spatial_shapes_list=LEVELS,
    )  # fmt: skip
    assert_same(layer(query, reference, source, LEVELS), expected, inputs, 1e-12)


@references
def test_where_it_looked_and_with_what_weights(kind, per_level):
    layer = draw_module([2, 1, 3])
    query, reference, source = draw_tokens(kind, per_level)
    out, locations, weights = layer.with_weights(query, reference, source, LEVELS)
    assert torch.equal(out, layer(query, reference, source, LEVELS))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 7, HEADS, dtype=torch.float64))
    values = layer.value(source).unflatten(-1, (HEADS, -1))
    again = layer.out(by_hand(values, LEVELS, [2, 1, 3], locations, weights))
    torch.testing.assert_close(out, again, rtol=1e-12, atol=1e-12)


def test_one_reference_for_all_images():
    layer = draw_module()
    query, reference, source = draw_tokens("points", per_level=False)
    shared = layer(query, reference[:1], source, LEVELS)
    torch.testing.assert_close(shared, layer(query, reference[:1].expand(2, -1, -1), source, LEVELS))


def test_begins_in_all_directions():
    layer = DeformableAttention(DIM, HEADS, 2, [1, 3])
    query = torch.randn(1, 1, DIM)
    levels = [(20, 40), (10, 10)]
    _, locations, weights = layer.with_weights(query, torch.full((1, 1, 2), 0.5), torch.randn(1, 900, DIM), levels)
    cells = (locations[0, 0] - 0.5) * torch.tensor([[40, 20], *3 * [[10, 10]]])  # (H, K, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    steps = torch.tensor([1.0, 1, 2, 3])
    torch.testing.assert_close(cells, directions[:, None] * steps[:, None], rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 4))
    layer.reset_parameters()
    assert not layer.out.bias.any() and not layer.offsets.weight.any() and layer.value.weight.any()


def test_autocast():
    layer = draw_module().float()
    query, reference, source = (tensor.detach().float() for tensor in draw_tokens("boxes", per_level=False))
    exact = layer(query, reference, source, LEVELS)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(query, reference, source, LEVELS)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    out.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_in_inference_mode_first():
    """What is kept between calls must serve training afterwards."""
    deformable.sheet_of.cache_clear()
    layer = draw_module()
    query, reference, source = draw_tokens("points", per_level=False)
    with torch.inference_mode():
        first = layer(query, reference, source, LEVELS)
    again = layer(query, reference, source, LEVELS)
    again.sum().backward()
    assert torch.equal(first, again)


@pytest.mark.slow
def test_exported_graph_gives_the_same():
    layer = draw_module().eval()
    query, reference, source = (tensor.detach() for tensor in draw_tokens("boxes", per_level=False))
    program = torch.export.export(layer, (query, reference, source, LEVELS), strict=False)
    names = {str(node.target) for node in program.graph.nodes}
    assert any("grid_sampler" in name for name in names)
    found = program.module()(query, reference, source, LEVELS)
    torch.testing.assert_close(found, layer(query, reference, source, LEVELS))

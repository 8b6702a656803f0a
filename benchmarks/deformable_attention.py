"""Deformable attention: ours beside transformers' in pure PyTorch, of the same numbers, turn by turn.

    python -m benchmarks.deformable_attention --json benchmarks/results/deformable_attention.json
    python -m benchmarks.deformable_attention --cases decoder --parts sampling --batches 2 --seconds 3

The cases are those of Deformable DETR at 480 x 480 pixels: four levels of strides 8 to 64, width 256, 8 heads, 4
points of each level. In the encoder every cell of every level is a query with its own middle as reference; in the
decoder 300 queries have random boxes. Points lie around their reference with a deviation of three cells. `sampling` is
reading and summing alone, `module` has the projections too. `train` is forward and backward to all inputs and
parameters. Before, both are compared in float64: what is measured is the same.

`ratio` is the median over the pairs of ours / transformers': below 1, ours is faster; `low` and `high` are its
quartiles. `kept` is what autograd keeps for the backward pass, inputs and parameters not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.speed_vit import compare
from saccade.layers.deformable import DeformableAttention, deformable_sampling

LEVELS, DIM, HEADS, POINTS, QUERIES, SPREAD = [(60, 60), (30, 30), (15, 15), (8, 8)], 256, 8, 4, 300, 3.0
TOLERANCE = 1e-10  # relative, in float64
THEIR_NAMES = {
    "value": "value_proj", "offsets": "sampling_offsets", "weights": "attention_weights", "out": "output_proj",
}  # fmt: skip

COLUMNS = {
    "name": "", "ours_ms": ".1f", "transformers_ms": ".1f", "ratio": ".3f", "low": ".3f", "high": ".3f", "pairs": "d",
    "ours_kept_mb": ".1f", "transformers_kept_mb": ".1f", "others_cores": ".2f",
}  # fmt: skip


@dataclass
class Contest:
    """The same function twice, and what gradients are wanted of."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    ours_of: list[Tensor]
    theirs_of: list[Tensor]


def middles() -> Tensor:
    """Of all cells of all levels, (N, 2)."""

    def of_level(h: int, w: int) -> Tensor:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        return torch.stack((x, y), dim=-1).flatten(0, 1)

    return torch.cat([of_level(h, w) for h, w in LEVELS])


def references(case: str, batch: int) -> Tensor:
    if case == "encoder":
        return middles().expand(batch, -1, -1)
    return torch.cat((torch.rand(batch, QUERIES, 2), torch.rand(batch, QUERIES, 2) * 0.4 + 0.1), dim=-1)


def sampling(case: str, batch: int) -> Contest:
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    reference = references(case, batch)
    Q, L = reference.shape[1], len(LEVELS)
    size = torch.tensor([(w, h) for h, w in LEVELS])[:, None]
    values = torch.randn(batch, sum(h * w for h, w in LEVELS), HEADS, DIM // HEADS)
    scatter = torch.randn(batch, Q, HEADS, L, POINTS, 2) * SPREAD / size
    locations = reference[:, :, None, None, None, :2] + scatter
    weights = torch.randn(batch, Q, HEADS, L * POINTS).softmax(dim=-1).unflatten(-1, (L, POINTS))
    inputs = [tensor.requires_grad_() for tensor in (values, locations, weights)]
    peer = MultiScaleDeformableAttention()
    shapes = torch.tensor(LEVELS)
    return Contest(
        lambda: deformable_sampling(values, LEVELS, [POINTS] * L, locations.flatten(3, 4), weights.flatten(3)),
        lambda: peer(values, shapes, LEVELS, torch.zeros(L, dtype=torch.long), locations, weights, 64),
        inputs,
        inputs,
    )


def module(case: str, batch: int) -> Contest:
    from transformers.models.deformable_detr import modeling_deformable_detr as theirs

    layer = DeformableAttention(DIM, HEADS, len(LEVELS), POINTS)
    nn.init.normal_(layer.offsets.weight, std=SPREAD / DIM**0.5)
    nn.init.normal_(layer.weights.weight, std=DIM**-0.5)
    config = SimpleNamespace(d_model=DIM, num_feature_levels=len(LEVELS), disable_custom_kernels=True)
    peer = theirs.DeformableDetrMultiscaleDeformableAttention(config, HEADS, POINTS)  # type: ignore[arg-type]
    names = {name: THEIR_NAMES[name.split(".")[0]] + "." + name.split(".")[1] for name in layer.state_dict()}
    peer.load_state_dict({names[name]: tensor for name, tensor in layer.state_dict().items()})
    reference = references(case, batch)
    query = torch.randn(batch, reference.shape[1], DIM, requires_grad=True)
    source = torch.randn(batch, sum(h * w for h, w in LEVELS), DIM, requires_grad=True)
    of_levels = reference[:, :, None].expand(-1, -1, len(LEVELS), -1)
    shapes = torch.tensor(LEVELS)
    return Contest(
        lambda: layer(query, reference, source, LEVELS),
        lambda: peer(
            query, encoder_hidden_states=source, reference_points=of_levels,
            spatial_shapes=shapes, spatial_shapes_list=LEVELS,
        )[0],
        [query, source, *layer.parameters()],
        [query, source, *(peer.get_parameter(names[name]) for name, _ in layer.named_parameters())],
    )  # fmt: skip


PARTS = {"sampling": sampling, "module": module}


def forward(run: Callable[[], Tensor], _: list[Tensor], __: Tensor) -> Callable[[], object]:
    def step() -> Tensor:
        with torch.no_grad():
            return run()

    return step


def train(run: Callable[[], Tensor], inputs: list[Tensor], upstream: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(), inputs, upstream)


MODES = {"forward": forward, "train": train}


def kept(run: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """MiB that autograd keeps between forward and backward."""
    storages: dict[int, Tensor] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its address is not given away
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del out
    return total / 2**20


def difference(contest: Contest) -> float:
    """The largest of output and gradients, each relative to its largest number."""
    ours, theirs = contest.ours(), contest.theirs()
    upstream = torch.randn(ours.shape)
    found = ours, *torch.autograd.grad(ours, contest.ours_of, upstream)
    wanted = theirs, *torch.autograd.grad(theirs, contest.theirs_of, upstream)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(found, wanted, strict=True))


def measure(case: str, part: str, batch: int, seconds: float, least: int) -> Iterator[report.Row]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    apart = difference(PARTS[part](case, 1))
    torch.set_default_dtype(torch.float32)
    if apart > TOLERANCE:
        raise SystemExit(f"{case} {part}: ours and transformers' differ by {apart:.1e}")
    contest = PARTS[part](case, batch)
    upstream = torch.randn(contest.ours().shape)
    for mode, make in MODES.items():
        load = report.Load()
        row = {"name": f"{case} {part} {mode} {batch}", "case": case, "part": part, "mode": mode, "batch": batch}
        ours = make(contest.ours, contest.ours_of, upstream)
        theirs = make(contest.theirs, contest.theirs_of, upstream)
        row |= compare(ours, theirs, seconds, least)
        row |= {"transformers_ms": row.pop("timm_ms"), "others_cores": load.others(), "difference": apart}
        if mode == "train":
            row["ours_kept_mb"] = kept(contest.ours, contest.ours_of)
            row["transformers_kept_mb"] = kept(contest.theirs, contest.theirs_of)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="encoder,decoder")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--batches", default="1,2")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, per line of the table")
    parser.add_argument("--least", type=int, default=5, help="pairs per line, however long they take")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", type=Path, help="file that results are merged into, by name")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    rows = []
    for case in arguments.cases.split(","):
        for part in arguments.parts.split(","):
            for batch in map(int, arguments.batches.split(",")):
                for row in measure(case, part, batch, arguments.seconds, arguments.least):
                    row |= {"threads": arguments.threads, "versions": report.versions(("torch", "transformers"))}
                    rows.append(row)
                    print(f"{row['name']}: ratio {row['ratio']:.3f}", flush=True)
                    if arguments.json:
                        report.merge(arguments.json, [row])
    print(report.table(rows, COLUMNS))


if __name__ == "__main__":
    main()

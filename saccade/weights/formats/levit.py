"""LeViT as timm names it, in the form with matrices (`levit_*`, not `levit_conv_*`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.levit import LEVIT, LeViTConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.weights.formats.convolution import batch_norm, conv_norm
from saccade.weights.formats.reference import as_described
from saccade.weights.formats.table import Format, Peer, Rule, Shapes, Stage

HEADS = ("head", "head_dist")


def _pointwise(ours: str, theirs: str) -> list[Rule]:
    """Our convolution of one pixel is their matrix."""
    weight = Rule(
        f"{ours}.conv.weight",
        (f"{theirs}.linear.weight",),
        lambda matrix: matrix[:, :, None, None],
        lambda weight: (weight[:, :, 0, 0],),
    )
    return [weight, *batch_norm(f"{ours}.norm", f"{theirs}.bn")]


def _biases(ours: str, theirs: str) -> Rule:
    """A table over rows and columns of distances, which they keep flat and which is square."""

    def read(flat: Tensor) -> Tensor:
        side = round(flat.shape[1] ** 0.5)
        return flat.unflatten(1, (side, side))

    return Rule(f"{ours}.table", (theirs,), read, lambda table: (table.flatten(1),))


def _head(count: int) -> list[Rule]:
    """The mean of their classifiers is one over the summaries side by side."""
    weights, biases = (tuple(f"{head}.linear.{name}" for head in HEADS[:count]) for name in ("weight", "bias"))
    return [
        Rule(
            "head.weight",
            weights,
            lambda *parts: torch.cat(parts, dim=1) / count,
            lambda whole: tuple((whole * count).chunk(count, dim=1)),
            gradient=lambda *parts: torch.cat(parts, dim=1) * count,
        ),
        Rule(
            "head.bias",
            biases,
            lambda *parts: torch.stack(parts).sum(dim=0) / count,
            lambda whole: (whole,) * count,
            gradient=lambda *parts: torch.stack(parts).sum(dim=0),
        ),
    ]


def _blocks(row: LeViTConfig) -> list[tuple[str, str, bool]]:
    """Paths of every block on both sides, and whether it halves the map."""
    found = []
    for stage, depth in enumerate(row.depths):
        ours, theirs = f"backbone.stages.{stage}", f"stages.{stage}"
        found += [(f"{ours}.0", f"{theirs}.downsample", True)] if stage else []
        found += [(f"{ours}.{i + (stage > 0)}", f"{theirs}.blocks.{i}", False) for i in range(depth)]
    return found


def timm_rules(row: Row, classes: int) -> list[Rule]:
    assert isinstance(row, LeViTConfig)
    rules: list[Rule] = []
    for i in range(4):
        rules += conv_norm(f"backbone.stem.{i}", f"stem.conv{i + 1}.linear", f"stem.conv{i + 1}.bn")
    for ours, theirs, halves in _blocks(row):
        inner = f"{theirs}.{'attn_downsample' if halves else 'attn'}"
        if halves:
            rules += _pointwise(f"{ours}.attention.q", f"{inner}.q.ln") + _pointwise(
                f"{ours}.attention.kv", f"{inner}.kv"
            )
        else:
            rules += _pointwise(f"{ours}.attention.qkv", f"{inner}.qkv")
        rules.append(_biases(f"{ours}.attention.bias", f"{inner}.attention_biases"))
        rules += _pointwise(f"{ours}.attention.out", f"{inner}.proj.ln")
        rules += _pointwise(f"{ours}.up", f"{theirs}.mlp.ln1") + _pointwise(f"{ours}.down", f"{theirs}.mlp.ln2")
    for i, head in enumerate(HEADS[: row.summaries]):
        rules += batch_norm(f"backbone.norms.{i}", f"{head}.bn")
    return rules + (_head(row.summaries) if classes else [])


def timm_stages(row: Row) -> list[Stage]:
    """Theirs are tokens, row by row."""
    assert isinstance(row, LeViTConfig)
    return [
        Stage("stem", "backbone.stem", "stem"),
        *(
            Stage(theirs, ours, theirs, ours_as=lambda x: x.flatten(2).transpose(1, 2))
            for ours, theirs, _ in _blocks(row)
        ),
    ]


def timm_row(shapes: Shapes, config: Mapping[str, Any]) -> LeViTConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"looks like a LeViT, but {name} is missing: is the file complete?")
        return shapes[name]

    def per_stage(of: list[int]) -> tuple[int, int, int]:
        return of[0], of[1], of[2]

    first = "stages.{}.blocks.0.attn.{}"
    biases = [shape(first.format(i, "attention_biases")) for i in range(3)]
    heads, dims = [b[0] for b in biases], [shape(first.format(i, "proj.ln.linear.weight"))[0] for i in range(3)]
    values = shape(first.format(0, "proj.ln.linear.weight"))[1]
    depths = [len({f[1] for n in shapes if (f := re.match(rf"stages\.{i}\.blocks\.(\d+)\.", n))}) for i in range(3)]
    return LeViTConfig(
        dims=per_stage(dims),
        depths=per_stage(depths),
        heads=per_stage(heads),
        key_dim=(shape(first.format(0, "qkv.linear.weight"))[0] - values) // heads[0] // 2,
        summaries=sum(f"{head}.bn.weight" in shapes for head in HEADS),
        image_size=16 * round(biases[0][1] ** 0.5),
    )


def timm_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, LeViTConfig)
    alike = replace(row, summaries=2)
    name = next((name for name, known in LEVIT.items() if alike.is_like(known)), None)
    arguments = {} if name else _timm_arguments(row)
    if row.image_size != 224:
        arguments["img_size"] = row.image_size
    config: dict[str, Any] = {
        "architecture": name or "levit_128s",
        "num_classes": classes,
        "num_features": row.dims[-1],
        "pretrained_cfg": {"input_size": [3, row.image_size, row.image_size], "num_classes": classes},
    }
    if row.summaries != 2:
        arguments["distilled"] = False
    return {**config, "model_args": arguments} if arguments else config


def _timm_arguments(row: LeViTConfig) -> dict[str, Any]:
    return {
        "embed_dim": list(row.dims),
        "depth": list(row.depths),
        "num_heads": list(row.heads),
        "key_dim": row.key_dim,
    }


def _build_timm(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    from timm.models.levit import Levit, LevitDistilled

    assert isinstance(row, LeViTConfig)
    if (described := as_described(config, classes, {})) is not None:
        return described
    kind = LevitDistilled if row.summaries == 2 else Levit
    return kind(img_size=row.image_size, num_classes=classes, **_timm_arguments(row))


FORMATS: tuple[Format, ...] = (
    Format(
        dialect="timm",
        family=LeViTConfig.family,
        recognises=lambda shapes, config: len(shapes.get("stages.0.blocks.0.attn.qkv.linear.weight", ())) == 2,
        row=timm_row,
        classes=lambda shapes, config: shapes.get("head.linear.weight", (0,))[0],
        rules=timm_rules,
        stages=timm_stages,
        write_config=timm_config,
        peer=Peer("timm", _build_timm, lambda model, images: model(images)),
        preprocessing=PreprocessingConfig(image_size=224, stride=32, crop=0.9, interpolation="bicubic"),
    ),
)

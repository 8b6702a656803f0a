"""EfficientFormer as timm and its authors (https://github.com/snap-research/EfficientFormer) name it.

Both have two heads, one of which learned from a teacher, and average what they say: that is one head of their mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.efficientformer import EFFICIENTFORMER, EfficientFormerConfig, offset_indices
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.weights.formats.convolution import conv_norm
from saccade.weights.formats.reference import as_described
from saccade.weights.formats.table import Format, NoWords, Peer, Rule, Shapes, Stage, module, same

SCALES = {"scale1": "ls1.gamma", "scale2": "ls2.gamma"}
ATTENTION = {"heads": 8, "head_dim": 32, "value_dim": 128, "grid": 7}  # the only ones that timm builds

# timm's names and the authors', who count stages and the convolutions between them together
RENAMES = (
    ("stem.conv1.", "patch_embed.0."),
    ("stem.norm1.", "patch_embed.1."),
    ("stem.conv2.", "patch_embed.3."),
    ("stem.norm2.", "patch_embed.4."),
    *((f"stages.{i}.downsample.conv.", f"network.{2 * i - 1}.proj.") for i in range(1, 4)),
    *((f"stages.{i}.downsample.norm.", f"network.{2 * i - 1}.norm.") for i in range(1, 4)),
    *((f"stages.{i}.blocks.", f"network.{2 * i}.") for i in range(4)),
    ("head_dist.", "dist_head."),
)


def original_name(timm_name: str) -> str:
    name = next((new + timm_name.removeprefix(old) for old, new in RENAMES if timm_name.startswith(old)), timm_name)
    return re.sub(r"\.ls(\d)\.gamma$", r".layer_scale_\1", name)


def timm_name(original_name: str) -> str:
    name = re.sub(r"\.layer_scale_(\d)$", r".ls\1.gamma", original_name)
    return next((old + name.removeprefix(new) for old, new in RENAMES if name.startswith(new)), name)


def timm_rules(row: Row, classes: int) -> list[Rule]:
    assert isinstance(row, EfficientFormerConfig)
    rules: list[Rule] = []
    for i in range(2):
        rules += conv_norm(f"backbone.stem.{i}", f"stem.conv{i + 1}", f"stem.norm{i + 1}", bias=True)
    for i in range(3):
        theirs = f"stages.{i + 1}.downsample"
        rules += conv_norm(f"backbone.merges.{i}", f"{theirs}.conv", f"{theirs}.norm", bias=True)
    for ours, theirs, attends in _blocks(row):
        rules += _attention_block(ours, theirs) if attends else _pool_block(ours, theirs)
    return [*rules, *module("backbone.norm", "norm"), *(_heads() if classes else [])]


def _blocks(row: EfficientFormerConfig) -> list[tuple[str, str, bool]]:
    """Paths of every block, and whether it has attention. Theirs count the flattening before attention as a block."""
    first = row.depths[3] - row.attention_blocks
    places = [(stage, block) for stage, depth in enumerate(row.depths) for block in range(depth)]
    return [
        (
            f"backbone.stages.{stage}.{block}",
            f"stages.{stage}.blocks.{block + (stage == 3 and block >= first)}",
            stage == 3 and block >= first,
        )
        for stage, block in places
    ]


def _pool_block(ours: str, theirs: str) -> list[Rule]:
    return [
        *conv_norm(f"{ours}.widen", f"{theirs}.mlp.fc1", f"{theirs}.mlp.norm1", bias=True),
        *conv_norm(f"{ours}.narrow", f"{theirs}.mlp.fc2", f"{theirs}.mlp.norm2", bias=True),
        *(same(f"{ours}.{own}", f"{theirs}.{foreign}") for own, foreign in SCALES.items()),
    ]


def _attention_block(ours: str, theirs: str) -> list[Rule]:
    return [
        *module(f"{ours}.norm1", f"{theirs}.norm1"),
        *module(f"{ours}.attention.qkv", f"{theirs}.token_mixer.qkv"),
        *module(f"{ours}.attention.out", f"{theirs}.token_mixer.proj"),
        _biases(f"{ours}.attention.bias_table", f"{theirs}.token_mixer"),
        *module(f"{ours}.norm2", f"{theirs}.norm2"),
        *module(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
        *module(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
        *(same(f"{ours}.{own}", f"{theirs}.{foreign}") for own, foreign in SCALES.items()),
    ]


def _biases(ours: str, theirs: str) -> Rule:
    """Their file also says which offset each pair of tokens has; any other order than ours is refused."""

    def indices(table: Tensor) -> Tensor:
        side = math.isqrt(table.shape[1])
        return offset_indices((side, side), table.device)

    def read(table: Tensor, saved: Tensor) -> Tensor:
        if not torch.equal(saved, indices(table)):
            raise ValueError("offsets in another order than (|rows|, |columns|), row-major")
        return table

    return Rule(
        ours,
        (f"{theirs}.attention_biases", f"{theirs}.attention_bias_idxs"),
        read,
        write=lambda table: (table, indices(table)),
        gradient=lambda table, _: table,
    )


def _heads() -> list[Rule]:
    return [
        Rule(
            f"head.{name}",
            (f"head.{name}", f"head_dist.{name}"),
            read=lambda labels, teacher: (labels + teacher) / 2,
            write=lambda mean: (mean, mean),
            gradient=lambda labels, teacher: labels + teacher,  # each is half of ours
        )
        for name in ("weight", "bias")
    ]


def original_rules(row: Row, classes: int) -> list[Rule]:
    return [
        Rule(rule.ours, tuple(map(original_name, rule.theirs)), rule.read, rule.write, rule.gradient, rule.default)
        for rule in timm_rules(row, classes)
    ]


def timm_stages(row: Row) -> list[Stage]:
    assert isinstance(row, EfficientFormerConfig)
    return [
        Stage("stem", "backbone.stem", "stem"),
        *(
            Stage(ours.removeprefix("backbone.").replace("stages.", "block "), ours, theirs)
            for ours, theirs, _ in _blocks(row)
        ),
        Stage("norm", "backbone.norm", "norm"),
    ]


def original_stages(row: Row) -> list[Stage]:
    assert isinstance(row, EfficientFormerConfig)
    return [
        Stage(stage.name, stage.ours, original_name(f"{stage.theirs}.").removesuffix("."))
        for stage in timm_stages(row)
        if stage.theirs != "stem"
    ]


def _recognises(shapes: Shapes) -> bool:
    attends = any(name.startswith("stages.3.") and name.endswith(".attention_biases") for name in shapes)
    return attends and {"stem.conv1.weight", "stages.0.blocks.0.mlp.fc1.weight"} <= shapes.keys()


def timm_row(shapes: Shapes, config: Mapping[str, Any]) -> EfficientFormerConfig:
    """All is in the shapes, but for what LayerScale begins with, which trained weights replace."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"looks like an EfficientFormer, but {name} is missing: is the file complete?")
        return shapes[name]

    def depth(stage: int) -> int:
        return sum(bool(re.match(rf"stages\.{stage}\.blocks\.\d+\.mlp\.fc1\.weight", name)) for name in shapes)

    tables = [name for name in shapes if name.endswith(".token_mixer.attention_biases")]
    mixer = tables[0].removesuffix(".attention_biases")
    heads, offsets = shape(tables[0])
    value_dim = shape(f"{mixer}.proj.weight")[1] // heads
    hidden, width = shape("stages.0.blocks.0.mlp.fc1.weight")[:2]
    return EfficientFormerConfig(
        depths=(depth(0), depth(1), depth(2), depth(3)),
        widths=(
            width,
            shape("stages.1.downsample.conv.weight")[0],
            shape("stages.2.downsample.conv.weight")[0],
            shape("stages.3.downsample.conv.weight")[0],
        ),
        attention_blocks=len(tables),
        heads=heads,
        head_dim=(shape(f"{mixer}.qkv.weight")[0] // heads - value_dim) // 2,
        value_dim=value_dim,
        grid=math.isqrt(offsets),
        expansion=hidden // width,
    )


def _as_timm(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {timm_name(name): shape for name, shape in shapes.items()}


def _classes(shapes: Shapes) -> int:
    return shapes["head.weight"][0] if "head.weight" in shapes else 0


def timm_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, EfficientFormerConfig)
    name = next((name for name, known in EFFICIENTFORMER.items() if row.is_like(known)), None)
    config: dict[str, Any] = {
        "architecture": name or "efficientformer_l1",
        "num_classes": classes,
        "num_features": row.widths[-1],
        "pretrained_cfg": {"input_size": [3, 224, 224], "num_classes": classes, "fixed_input_size": True},
    }
    return config if name else {**config, "model_args": _timm_arguments(row)}


def _timm_arguments(row: EfficientFormerConfig) -> dict[str, Any]:
    if any(getattr(row, name) != value for name, value in ATTENTION.items()):
        raise NoWords(f"timm has no EfficientFormer whose attention is not of {ATTENTION}")
    return {
        "depths": list(row.depths),
        "embed_dims": list(row.widths),
        "num_vit": row.attention_blocks,
        "mlp_ratios": row.expansion,
    }


def _build_timm(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    from timm.models.efficientformer import EfficientFormer

    assert isinstance(row, EfficientFormerConfig)
    if (described := as_described(config, classes, {})) is not None:
        return described
    return EfficientFormer(num_classes=classes, drop_path_rate=row.drop_path, **_timm_arguments(row))


PREPROCESSING = PreprocessingConfig(image_size=224, stride=32, interpolation="bicubic", crop=0.95)

FORMATS: tuple[Format, ...] = (
    Format(
        dialect="timm",
        family=EfficientFormerConfig.family,
        recognises=lambda shapes, config: _recognises(shapes),
        row=timm_row,
        classes=lambda shapes, config: _classes(shapes),
        rules=timm_rules,
        stages=timm_stages,
        write_config=timm_config,
        peer=Peer("timm", _build_timm, lambda model, images: model(images)),
        preprocessing=PREPROCESSING,
    ),
    Format(
        dialect="original",
        family=EfficientFormerConfig.family,
        recognises=lambda shapes, config: "patch_embed.0.weight" in shapes and _recognises(_as_timm(shapes)),
        row=lambda shapes, config: timm_row(_as_timm(shapes), config),
        classes=lambda shapes, config: _classes(shapes),
        rules=original_rules,
        stages=original_stages,
        write_config=lambda row, classes: {},
        preprocessing=PREPROCESSING,
    ),
)

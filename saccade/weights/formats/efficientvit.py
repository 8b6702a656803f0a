"""EfficientViT as timm and its authors name it: https://github.com/mit-han-lab/efficientvit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.efficientvit import EFFICIENTVIT, EfficientViTConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.weights.formats.convolution import conv_norm
from saccade.weights.formats.reference import as_described, exact
from saccade.weights.formats.table import Format, Peer, Rule, Shapes, Stage, module, same

# timm's names and the authors'; the authors count the stem's first convolution as block 0.
RENAMES = (
    ("stem.in_conv.", "backbone.input_stem.op_list.0."),
    *((f"stem.res{i}.", f"backbone.input_stem.op_list.{i + 1}.") for i in range(9)),
    ("stem.", "backbone.input_stem."),
    *((f"stages.{i}.blocks.", f"backbone.stages.{i}.op_list.") for i in range(4)),
    ("head.in_conv.", "head.op_list.0."),
    ("head.classifier.0.", "head.op_list.2.linear."),
    ("head.classifier.1.", "head.op_list.2.norm."),
    ("head.classifier.4.", "head.op_list.3.linear."),
)


def _renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    return next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name)


def original_name(timm_name: str) -> str:
    return _renamed(timm_name, RENAMES)


def timm_name(original_name: str) -> str:
    return _renamed(original_name, ((theirs, timms) for timms, theirs in RENAMES))


def _layer(ours: str, theirs: str, *, norm: bool = True) -> list[Rule]:
    return conv_norm(ours, f"{theirs}.conv", f"{theirs}.norm") if norm else module(f"{ours}.conv", f"{theirs}.conv")


def _residual(ours: str, theirs: str, *, widened: bool = True, late_norm: bool = False) -> list[Rule]:
    first = _layer(f"{ours}.widen", f"{theirs}.inverted_conv", norm=not late_norm) if widened else []
    return [
        *first,
        *_layer(f"{ours}.depthwise", f"{theirs}.depth_conv", norm=not late_norm),
        *_layer(f"{ours}.narrow", f"{theirs}.point_conv"),
    ]


def _attention(ours: str, theirs: str) -> list[Rule]:
    return [
        same(f"{ours}.qkv.weight", f"{theirs}.qkv.conv.weight"),
        same(f"{ours}.gather.weight", f"{theirs}.aggreg.0.0.weight"),
        same(f"{ours}.mix.weight", f"{theirs}.aggreg.0.1.weight"),
        *_layer(f"{ours}.out", f"{theirs}.proj"),
    ]


def _blocks(row: EfficientViTConfig) -> list[tuple[int, int, bool]]:
    """Stage, place in it and whether it is one with attention, for every block."""
    return [
        (stage, block, stage >= 2 and block > 0)
        for stage, depth in enumerate(row.depths[1:])
        for block in range(depth + (stage >= 2))
    ]


def timm_rules(row: Row, classes: int) -> list[Rule]:
    assert isinstance(row, EfficientViTConfig)
    widened = row.expansion != 1
    rules = _layer("backbone.stem.0", "stem.in_conv")
    for i in range(row.depths[0]):
        rules += _residual(f"backbone.stem.{i + 1}", f"stem.res{i}.main", widened=False)
    for stage, block, attends in _blocks(row):
        ours, theirs = f"backbone.stages.{stage}.{block}", f"stages.{stage}.blocks.{block}"
        if attends:
            rules += _attention(f"{ours}.attention", f"{theirs}.context_module.main")
            rules += _residual(f"{ours}.local", f"{theirs}.local_module.main", widened=widened, late_norm=True)
        else:
            rules += _residual(ours, f"{theirs}.main", widened=widened, late_norm=stage >= 2)
    rules += _layer("backbone.widen", "head.in_conv")
    rules.append(same("backbone.summarise.weight", "head.classifier.0.weight"))
    rules += module("backbone.norm", "head.classifier.1")
    return rules + (module("head", "head.classifier.4") if classes else [])


def original_rules(row: Row, classes: int) -> list[Rule]:
    return [replace(rule, theirs=tuple(map(original_name, rule.theirs))) for rule in timm_rules(row, classes)]


def timm_stages(row: Row) -> list[Stage]:
    assert isinstance(row, EfficientViTConfig)
    return [
        Stage("stem", "backbone.stem", "stem"),
        *(
            Stage(f"stage {stage}, block {block}", f"backbone.stages.{stage}.{block}", f"stages.{stage}.blocks.{block}")
            for stage, block, _ in _blocks(row)
        ),
        Stage("widened", "backbone.widen", "head.in_conv"),
    ]


def original_stages(row: Row) -> list[Stage]:
    return [replace(stage, theirs=original_name(f"{stage.theirs}.").removesuffix(".")) for stage in timm_stages(row)]


def _as_timm(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {timm_name(name): shape for name, shape in shapes.items()}


def _row(shapes: Shapes, config: Mapping[str, Any], attention_eps: float) -> EfficientViTConfig:
    """All but the size of pictures is in the shapes, which have timm's names here."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"looks like an EfficientViT, but {name} is missing: is the file complete?")
        return shapes[name]

    def count(pattern: str) -> int:
        return len({found[1] for name in shapes if (found := re.match(pattern, name))})

    blocks = [count(rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
    last = [shape(f"stages.{stage}.blocks.0.main.point_conv.conv.weight")[0] for stage in range(4)]
    stem = shape("stem.in_conv.conv.weight")[0]
    wide = shape("stages.3.blocks.1.local_module.main.depth_conv.conv.weight")[0]
    summary, hidden = shape("head.classifier.0.weight")
    size = config.get("pretrained_cfg", config).get("input_size", (3, 224, 224))
    return EfficientViTConfig(
        image_size=size[-1],
        widths=(stem, last[0], last[1], last[2], last[3]),
        depths=(count(r"stem\.res(\d+)\."), blocks[0], blocks[1], blocks[2] - 1, blocks[3] - 1),
        head_dim=shape("stages.3.blocks.1.context_module.main.aggreg.0.1.weight")[1],
        summary_widths=(hidden, summary),
        expansion=wide // last[3],
        attention_eps=attention_eps,
    )


def timm_row(shapes: Shapes, config: Mapping[str, Any]) -> EfficientViTConfig:
    return _row(shapes, config, attention_eps=1e-5)


def original_row(shapes: Shapes, config: Mapping[str, Any]) -> EfficientViTConfig:
    return _row(_as_timm(shapes), config, attention_eps=1e-15)


def _classes(shapes: Shapes) -> int:
    return shapes["head.classifier.4.weight"][0] if "head.classifier.4.weight" in shapes else 0


def _recognises(shapes: Shapes) -> bool:
    """The large variants (l1, l2, l3) have no attention in their third stage and other convolutions in the stem."""
    return {"stem.in_conv.conv.weight", "stages.2.blocks.1.context_module.main.qkv.conv.weight"} <= shapes.keys()


def _same_but_eps(row: EfficientViTConfig, known: EfficientViTConfig) -> bool:
    return row.is_like(replace(known, attention_eps=row.attention_eps))


def timm_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, EfficientViTConfig)
    name = next((name for name, known in EFFICIENTVIT.items() if _same_but_eps(row, known)), None)
    size = [3, row.image_size, row.image_size]
    config: dict[str, Any] = {
        "architecture": name or "efficientvit_b0",
        "num_classes": classes,
        "num_features": row.summary_widths[1],
        "pretrained_cfg": {"input_size": size, "num_classes": classes, "fixed_input_size": False},
    }
    return config if name else {**config, "model_args": _timm_arguments(row)}


def _timm_arguments(row: EfficientViTConfig) -> dict[str, Any]:
    return {
        "widths": list(row.widths),
        "depths": list(row.depths),
        "head_dim": row.head_dim,
        "expand_ratio": row.expansion,
        "head_widths": list(row.summary_widths),
    }


def _build_timm(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    """timm's constant in the divisor of attention becomes the row's, unless the source is timm's own."""
    from timm.models.efficientvit_mit import EfficientVit, LiteMLA

    assert isinstance(row, EfficientViTConfig)
    if (described := as_described(config, classes, {})) is not None:
        return described
    model = EfficientVit(num_classes=classes, **_timm_arguments(row))
    for part in model.modules():
        if isinstance(part, LiteMLA):
            part.eps = row.attention_eps
    return model


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with exact(images):  # timm's attention is in float32 even in a float64 model
        return model(images)


PREPROCESSING = PreprocessingConfig(image_size=224, stride=32, crop=0.95, interpolation="bicubic")

FORMATS: tuple[Format, ...] = (
    Format(
        dialect="timm",
        family=EfficientViTConfig.family,
        recognises=lambda shapes, config: _recognises(shapes),
        row=timm_row,
        classes=lambda shapes, config: _classes(shapes),
        rules=timm_rules,
        stages=timm_stages,
        write_config=timm_config,
        peer=Peer("timm", _build_timm, _logits),
        preprocessing=PREPROCESSING,
    ),
    Format(
        dialect="original",
        family=EfficientViTConfig.family,
        recognises=lambda shapes, config: (
            "backbone.input_stem.op_list.0.conv.weight" in shapes and _recognises(_as_timm(shapes))
        ),
        row=original_row,
        classes=lambda shapes, config: _classes(_as_timm(shapes)),
        rules=original_rules,
        stages=original_stages,
        write_config=lambda row, classes: {},
        preprocessing=PREPROCESSING,
    ),
)

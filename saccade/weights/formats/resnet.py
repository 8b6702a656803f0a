"""ResNet as torchvision, timm and Hugging Face name it. timm's names are torchvision's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.resnet import EXPANSION, ResNetConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.weights.formats.convolution import conv_norm
from saccade.weights.formats.reference import as_described, stated
from saccade.weights.formats.table import Format, NoWords, Peer, Rule, Shapes, Stage, module

WIDTHS = (64, 128, 256, 512)  # the only ones that torchvision builds
# timm's models of the plain form, by (bottleneck, depths); others, such as resnetblur50, have shapes like these and
# compute something else
PLAIN = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (2, 2, 2, 2)): "resnet26",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}


@dataclass(frozen=True)
class Names:
    """Patterns of a dialect: s and b count stages and blocks from 0, t from 1, k is a convolution's place."""

    stem: tuple[str, str]
    stem_output: str
    block: str
    convs: tuple[str, str]
    convs_from: int
    shortcut: tuple[str, str]
    head: str


TORCHVISION = Names(
    stem=("conv1", "bn1"),
    stem_output="relu",
    block="layer{t}.{b}",
    convs=("conv{k}", "bn{k}"),
    convs_from=1,
    shortcut=("downsample.0", "downsample.1"),
    head="fc",
)
TIMM = Names(**{**vars(TORCHVISION), "stem_output": "act1"})
HUGGINGFACE = Names(
    stem=("embedder.embedder.convolution", "embedder.embedder.normalization"),
    stem_output="embedder.embedder",
    block="encoder.stages.{s}.layers.{b}",
    convs=("layer.{k}.convolution", "layer.{k}.normalization"),
    convs_from=0,
    shortcut=("shortcut.convolution", "shortcut.normalization"),
    head="classifier.1",
)


def rules(row: Row, classes: int, names: Names, prefix: str = "") -> list[Rule]:
    """`prefix` is that of the backbone within a larger model of theirs."""
    assert isinstance(row, ResNetConfig)
    conv, norm = names.stem
    rules = conv_norm("backbone.stem", prefix + conv, prefix + norm)
    for stage, block in _blocks(row):
        ours = f"backbone.stages.{stage}.{block}"
        theirs = prefix + names.block.format(s=stage, t=stage + 1, b=block)
        for i in range(3 if row.bottleneck else 2):
            conv, norm = (name.format(k=i + names.convs_from) for name in names.convs)
            rules += conv_norm(f"{ours}.convs.{i}", f"{theirs}.{conv}", f"{theirs}.{norm}")
        if _has_shortcut(row, stage, block):
            conv, norm = names.shortcut
            rules += conv_norm(f"{ours}.shortcut", f"{theirs}.{conv}", f"{theirs}.{norm}")
    return rules + (module("head", names.head) if classes else [])


def _blocks(row: ResNetConfig) -> list[tuple[int, int]]:
    return [(stage, block) for stage in range(4) for block in range(row.depths[stage])]


def _has_shortcut(row: ResNetConfig, stage: int, block: int) -> bool:
    return block == 0 and (stage > 0 or row.channels[0] != row.stem)


def stages(row: Row, names: Names, prefix: str = "") -> list[Stage]:
    assert isinstance(row, ResNetConfig)
    return [
        Stage("stem", "backbone.stem", prefix + names.stem_output),
        *(
            Stage(
                f"stage {stage + 1}, block {block + 1}",
                f"backbone.stages.{stage}.{block}",
                prefix + names.block.format(s=stage, t=stage + 1, b=block),
            )
            for stage, block in _blocks(row)
        ),
    ]


def _depths(shapes: Shapes, pattern: str) -> tuple[int, int, int, int]:
    """Blocks of each stage; `pattern` captures stage (in the order of the stages) and block."""
    found = {(int(match[1]), int(match[2])) for name in shapes if (match := re.match(pattern, name))}
    counts = [len([1 for stage, _ in found if stage == each]) for each in sorted({stage for stage, _ in found})]
    if len(counts) != 4:
        raise UserError(f"looks like a ResNet, but it has {len(counts)} stages and not 4: is the file complete?")
    return counts[0], counts[1], counts[2], counts[3]


def _plain_widths(shapes: Shapes) -> tuple[int, int, int, int] | None:
    """The width of each stage, in torchvision's names; None where it is no ResNet, or one of another kind."""
    if shapes.get("conv1.weight", ())[1:] != (3, 7, 7) or "bn1.running_mean" not in shapes:
        return None
    last = "conv3" if "layer1.0.conv3.weight" in shapes else "conv2"
    widths = []
    for stage in range(1, 5):
        inner = shapes.get(f"layer{stage}.0.conv2.weight", ())
        outer = shapes.get(f"layer{stage}.0.{last}.weight", ())
        grouped = inner[:1] != inner[1:2]
        if not outer or grouped or outer[0] != inner[0] * (EXPANSION if last == "conv3" else 1):
            return None
        widths.append(inner[0])
    others = [name for name in shapes if re.match(r"layer\d\.\d+\.(?!conv\d|bn\d|downsample\.[01])", name)]
    return None if others else (widths[0], widths[1], widths[2], widths[3])


def plain_row(shapes: Shapes, config: Mapping[str, Any]) -> ResNetConfig:
    widths = _plain_widths(shapes)
    assert widths is not None
    arguments = config.get("model_args") or {}
    act = arguments.get("act_layer", "relu")
    if act != "relu":
        raise UserError(f"config.json: a ResNet with act_layer {act!r} is not supported, only 'relu'")
    stride = arguments.get("output_stride", 32)
    if stride not in (16, 32):
        raise UserError(f"a ResNet with an output stride of {stride} is not supported, only 32 and 16")
    size = (config.get("pretrained_cfg") or {}).get("input_size", (3, 224, 224))
    return ResNetConfig(
        image_size=int(size[-1]),
        depths=_depths(shapes, r"layer(\d)\.(\d+)\.conv1\.weight"),
        bottleneck="layer1.0.conv3.weight" in shapes,
        widths=widths,
        stem=shapes["conv1.weight"][0],
        dilated=stride == 16,
    )


def _classes(shapes: Shapes, name: str) -> int:
    return shapes[name][0] if name in shapes else 0


def _timm_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, ResNetConfig)
    size = [3, row.image_size, row.image_size]
    if row.stem != 64:
        raise NoWords(f"timm has no plain ResNet with a stem of {row.stem} channels")
    arguments: dict[str, Any] = {"output_stride": 16} if row.dilated else {}
    name = PLAIN.get((row.bottleneck, row.depths)) if row.widths == WIDTHS else None
    if name is None:
        name = "resnet50" if row.bottleneck else "resnet18"
        arguments |= {"layers": list(row.depths), "channels": list(row.widths)}
    return {
        "architecture": name,
        "num_classes": classes,
        "num_features": row.channels[-1],
        "pretrained_cfg": {"input_size": size, "num_classes": classes, "fixed_input_size": False},
        **({"model_args": arguments} if arguments else {}),
    }


def _build_timm(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    assert isinstance(row, ResNetConfig) and row.stem == 64
    if (described := as_described(config, classes, {})) is not None:
        return described
    return ResNet(
        Bottleneck if row.bottleneck else BasicBlock,  # pyright: ignore[reportArgumentType]
        row.depths,
        num_classes=classes,
        output_stride=16 if row.dilated else 32,
        channels=row.widths,
        drop_path_rate=row.drop_path,
    )


def _torchvision_config(row: Row, classes: int) -> dict[str, Any]:
    """There is none, but not every form exists."""
    assert isinstance(row, ResNetConfig)
    if row.widths != WIDTHS or row.stem != 64:
        raise NoWords(f"torchvision has no ResNet of widths {row.widths} after a stem of {row.stem}")
    return {}


def _build_torchvision(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    assert isinstance(row, ResNetConfig)
    _torchvision_config(row, classes)
    model = ResNet(
        Bottleneck if row.bottleneck else BasicBlock,
        list(row.depths),
        num_classes=max(1, classes),
        replace_stride_with_dilation=[False, False, row.dilated],
    )
    if not classes:
        model.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _prefix(classes: int) -> str:
    return "resnet." if classes else ""  # of the backbone, within a classifier


def _hf_bare(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Without the prefix that the backbone has within a classifier."""
    return {name.removeprefix("resnet."): shape for name, shape in shapes.items()}


def _hf_recognises(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    prefix = _prefix(_classes(shapes, "classifier.1.weight"))
    known = (
        f"{prefix}embedder.embedder.convolution.weight",
        f"{prefix}encoder.stages.3.layers.0.layer.1.convolution.weight",
    )
    return all(name in shapes for name in known) and config.get("model_type", "resnet") == "resnet"


def huggingface_row(shapes: Shapes, config: Mapping[str, Any]) -> ResNetConfig:
    standard = {"downsample_in_first_stage": False, "downsample_in_bottleneck": False, "hidden_act": "relu"}
    for name, value in standard.items():
        if config.get(name, value) != value:
            raise UserError(f"config.json: a ResNet with {name} = {config[name]!r} is not supported, only {value!r}")
    bare = _hf_bare(shapes)
    inner = "encoder.stages.{}.layers.0.layer.{}.convolution.weight"
    bottleneck = inner.format(0, 2) in bare
    widths = [bare[inner.format(stage, 1)][0] for stage in range(4)]
    last = [bare[inner.format(stage, 2 if bottleneck else 1)][0] for stage in range(4)]
    if bottleneck and last != [EXPANSION * width for width in widths]:
        raise UserError(f"a ResNet of widths {widths} and {last} is not supported: {EXPANSION} times as wide outside")
    return ResNetConfig(
        depths=_depths(bare, r"encoder\.stages\.(\d+)\.layers\.(\d+)\."),
        bottleneck=bottleneck,
        widths=(widths[0], widths[1], widths[2], widths[3]),
        stem=bare["embedder.embedder.convolution.weight"][0],
    )


def huggingface_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, ResNetConfig)
    if row.dilated:
        raise NoWords("Hugging Face's ResNet has no dilated last stage; write another dialect")
    return {
        "architectures": ["ResNetForImageClassification" if classes else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": row.stem,
        "hidden_sizes": list(row.channels),
        "depths": list(row.depths),
        "layer_type": "bottleneck" if row.bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _build_hf(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    from transformers import ResNetConfig as TheirConfig
    from transformers import ResNetForImageClassification, ResNetModel

    values = TheirConfig.from_dict({**stated(config, huggingface_config(row, classes)), "num_labels": classes})
    return ResNetForImageClassification(values) if classes else ResNetModel(values)


def _hf_logits(model: nn.Module, images: Tensor) -> Tensor:
    outputs = model(images)
    return outputs.logits if hasattr(outputs, "logits") else outputs.pooler_output.flatten(1)


FORMATS: tuple[Format, ...] = (
    Format(
        dialect="torchvision",
        family=ResNetConfig.family,
        recognises=lambda shapes, config: not config and _plain_widths(shapes) is not None,
        row=plain_row,
        classes=lambda shapes, config: _classes(shapes, "fc.weight"),
        rules=lambda row, classes: rules(row, classes, TORCHVISION),
        stages=lambda row: stages(row, TORCHVISION),
        write_config=_torchvision_config,
        peer=Peer("torchvision", _build_torchvision, lambda model, images: model(images)),
        preprocessing=PreprocessingConfig(stride=32, interpolation="bilinear", crop=0.875),
    ),
    Format(
        dialect="timm",
        family=ResNetConfig.family,
        recognises=lambda shapes, config: (
            config.get("architecture") in PLAIN.values() and _plain_widths(shapes) is not None
        ),
        row=plain_row,
        classes=lambda shapes, config: _classes(shapes, "fc.weight"),
        rules=lambda row, classes: rules(row, classes, TIMM),
        stages=lambda row: stages(row, TIMM),
        write_config=_timm_config,
        peer=Peer("timm", _build_timm, lambda model, images: model(images)),
        preprocessing=PreprocessingConfig(stride=32, interpolation="bicubic", crop=0.95),
    ),
    Format(
        dialect="huggingface",
        family=ResNetConfig.family,
        recognises=_hf_recognises,
        row=huggingface_row,
        classes=lambda shapes, config: _classes(shapes, "classifier.1.weight"),
        rules=lambda row, classes: rules(row, classes, HUGGINGFACE, _prefix(classes)),
        stages=lambda row: stages(row, HUGGINGFACE, prefix="resnet."),
        write_config=huggingface_config,
        peer=Peer("transformers", _build_hf, _hf_logits),
        preprocessing=PreprocessingConfig(stride=32, interpolation="bicubic", crop=0.875),
    ),
)

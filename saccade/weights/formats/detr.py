"""DETR as Hugging Face and its own repository name it.

Published in the dialect of Hugging Face, its backbone has timm's names; transformers also builds it on a ResNet of its
own. Only the first can be dilated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.resnet import ResNetConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.models.detector import BoxTargets, DetectionOutputs, LayerOutputs
from saccade.models.detr import DETRConfig
from saccade.weights.formats import resnet
from saccade.weights.formats.detection_loss import loss_by_layers
from saccade.weights.formats.reference import FileNamed, transformers_places
from saccade.weights.formats.table import (
    DetectorPeer,
    Format,
    NoWords,
    ReferenceLoss,
    Rule,
    Shapes,
    Stage,
    module,
    packed,
    same,
)

PREPROCESSING = PreprocessingConfig(image_size=928, stride=32, interpolation="bilinear")
HEAD_WIDTH = 32  # of the published models; the original files do not say it
COUNTS = ("*.num_batches_tracked",)  # nothing reads them, and few files have them


@dataclass(frozen=True)
class BlockNames:
    """A dialect's names within a block; without `packed`, queries, keys and values have a matrix each."""

    self_attention: str
    norm1: str
    cross_attention: str
    norm2: str
    up: str
    down: str
    norm3: str
    encoder_norm3: str
    packed: bool


HUGGINGFACE = BlockNames(
    self_attention="self_attn",
    norm1="self_attn_layer_norm",
    cross_attention="encoder_attn",
    norm2="encoder_attn_layer_norm",
    up="fc1",
    down="fc2",
    norm3="final_layer_norm",
    encoder_norm3="final_layer_norm",
    packed=False,
)
ORIGINAL = BlockNames(
    self_attention="self_attn",
    norm1="norm1",
    cross_attention="multihead_attn",
    norm2="norm2",
    up="linear1",
    down="linear2",
    norm3="norm3",
    encoder_norm3="norm2",
    packed=True,
)


def attention(ours: str, theirs: str, *, packed_theirs: bool = False) -> list[Rule]:
    """A `MultiHeadAttention` of ours; theirs is `nn.MultiheadAttention`, or a layer each for queries, keys, values."""
    if packed_theirs:
        rules = [same(f"{ours}.qkv.{each}", f"{theirs}.in_proj_{each}") for each in ("weight", "bias")]
    else:
        parts = [f"{theirs}.{part}_proj" for part in "qkv"]
        rules = [packed(f"{ours}.qkv.{each}", *(f"{part}.{each}" for part in parts)) for each in ("weight", "bias")]
    return [*rules, *module(f"{ours}.out", f"{theirs}.out_proj")]


def block(ours: str, theirs: str, names: BlockNames, *, cross: bool) -> list[Rule]:
    """A `TransformerBlock` of ours."""
    rules = [
        *attention(f"{ours}.self_attention", f"{theirs}.{names.self_attention}", packed_theirs=names.packed),
        *module(f"{ours}.norm1", f"{theirs}.{names.norm1}"),
        *module(f"{ours}.mlp.up", f"{theirs}.{names.up}"),
        *module(f"{ours}.mlp.down", f"{theirs}.{names.down}"),
        *module(f"{ours}.norm3", f"{theirs}.{names.norm3 if cross else names.encoder_norm3}"),
    ]
    if cross:
        theirs_cross = f"{theirs}.{names.cross_attention}"
        rules += attention(f"{ours}.cross_attention", theirs_cross, packed_theirs=names.packed)
        rules += module(f"{ours}.norm2", f"{theirs}.{names.norm2}")
    return rules


def backbone_rules(row: Row, names: resnet.Names, prefix: str) -> list[Rule]:
    """A frozen ResNet within a larger model. Their frozen norms count no batches."""
    rules = resnet.rules(row, 0, names, prefix)
    return [_uncounted(rule) if rule.ours.endswith("num_batches_tracked") else rule for rule in rules]


def _uncounted(rule: Rule) -> Rule:
    return Rule(rule.ours, (), lambda: torch.zeros((), dtype=torch.long), lambda count: ())


def box_head(ours: str, theirs: str, depth: int = 3) -> list[Rule]:
    """A `perceptron` of ours."""
    return [rule for i in range(depth) for rule in module(f"{ours}.{2 * i}", f"{theirs}.layers.{i}")]


# --- Hugging Face ----------------------------------------------------------------------------------------------------

BODY = "model.backbone.conv_encoder.model."


def hf_body(shapes: Shapes, config: Mapping[str, Any], names: resnet.Names) -> ResNetConfig:
    """The backbone's row."""
    read = resnet.plain_row if names is resnet.TIMM else resnet.huggingface_row
    described = config.get("backbone_config") or {}
    dilated = bool(config.get("dilation")) or described.get("output_stride") == 16
    return replace(_frozen(read(_below(shapes, BODY), {})), dilated=dilated)


def _frozen(body: ResNetConfig) -> ResNetConfig:
    return replace(body, image_size=PREPROCESSING.image_size, frozen_norm=True)


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def hf_body_config(body: Row, names: resnet.Names, stages: list[int]) -> dict[str, Any]:
    """What config.json says of the backbone, of which a detector takes the maps of these stages (1 to 4)."""
    if not isinstance(body, ResNetConfig):
        raise NoWords(f"transformers builds DETR on a ResNet, not on {body.family}")
    if names is resnet.TIMM:
        name = resnet.PLAIN.get((body.bottleneck, body.depths))
        if name is None or body.widths != resnet.WIDTHS or body.stem != 64:
            raise NoWords(f"timm has no ResNet of {body.about} by name")
        described: dict[str, Any] = {"backbone": name, "use_timm_backbone": True, "use_pretrained_backbone": False}
    else:
        inner = resnet.huggingface_config(body, 0)  # refuses a dilated one
        described = {
            "backbone_config": {**inner, "out_features": [f"stage{i}" for i in stages]},
            "use_timm_backbone": False,
        }
    return {**described, "dilation": body.dilated}


def _hf_rules(row: Row, classes: int, names: resnet.Names) -> list[Rule]:
    assert isinstance(row, DETRConfig)
    stacks = (("encoder", row.encoder_depth, False), ("decoder", row.decoder_depth, True))
    return [
        *backbone_rules(row.backbone, names, BODY),
        *module("projection", "model.input_projection"),
        same("query_table", "model.query_position_embeddings.weight"),
        *(
            rule
            for stack, depth, cross in stacks
            for i in range(depth)
            for rule in block(f"{stack}.{i}", f"model.{stack}.layers.{i}", HUGGINGFACE, cross=cross)
        ),
        *module("norm", "model.decoder.layernorm"),
        *module("classes", "class_labels_classifier"),
        *box_head("boxes", "bbox_predictor"),
    ]


def _hf_recognises(shapes: Shapes, config: Mapping[str, Any], stem: str) -> bool:
    known = (
        f"{BODY}{stem}.weight",
        "model.input_projection.weight",
        "model.decoder.layers.0.encoder_attn.q_proj.weight",
        "class_labels_classifier.weight",
    )
    # the tables of "table-transformer" are detected by a pre-norm relative, which ends its encoder with a norm
    other = "model.encoder.layernorm.weight" in shapes
    return all(name in shapes for name in known) and not other and config.get("model_type", "detr") == "detr"


def _hf_row(shapes: Shapes, config: Mapping[str, Any], names: resnet.Names) -> DETRConfig:
    refuse_unsupported(config, "DETR")
    _refuse_auxiliary_loss(config)
    queries, dim = shapes["model.query_position_embeddings.weight"]
    return _row(
        hf_body(shapes, config, names),
        dim=dim,
        heads=int(config.get("encoder_attention_heads", dim // HEAD_WIDTH)),
        hidden=shapes["model.decoder.layers.0.fc1.weight"][0],
        depths=(depth_of(shapes, "model.encoder.layers."), depth_of(shapes, "model.decoder.layers.")),
        queries=queries,
        dropout=float(config.get("dropout", 0.1)),
    )


def refuse_unsupported(config: Mapping[str, Any], kind: str) -> None:
    """What transformers knows and ours does not; `kind` is the model's name."""
    standard = {"activation_function": "relu", "position_embedding_type": "sine", "num_channels": 3}
    for name, value in standard.items():
        if config.get(name, value) != value:
            raise UserError(f"config.json: a {kind} with {name} = {config[name]!r} is not supported, only {value!r}")
    for name in ("attention_heads", "ffn_dim"):
        if config.get(f"encoder_{name}") != config.get(f"decoder_{name}"):
            raise UserError(f"config.json: a {kind} whose {name} differ in encoder and decoder is not supported")


def _refuse_auxiliary_loss(config: Mapping[str, Any]) -> None:
    if config.get("auxiliary_loss"):
        raise UserError(
            "config.json: auxiliary_loss = true. With it, transformers passes each block of the decoder what its final "
            "norm makes of the block before, which is no DETR as published; it is not supported"
        )


def depth_of(shapes: Shapes, prefix: str) -> int:
    """How many blocks there are below these names."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def _row(
    body: ResNetConfig,
    *,
    dim: int,
    heads: int,
    hidden: int,
    depths: tuple[int, int],
    queries: int,
    dropout: float,
) -> DETRConfig:
    return DETRConfig(
        image_size=body.image_size,
        backbone=body,
        dim=dim,
        heads=heads,
        hidden=hidden,
        encoder_depth=depths[0],
        decoder_depth=depths[1],
        queries=queries,
        dropout=dropout,
    )


def _hf_config(row: Row, classes: int, names: resnet.Names) -> dict[str, Any]:
    assert isinstance(row, DETRConfig)
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        **hf_body_config(row.backbone, names, [4]),
        "num_queries": row.queries,
        "d_model": row.dim,
        **{f"{part}_layers": depth for part, depth in zip(("encoder", "decoder"), _depths(row), strict=True)},
        **{f"{part}_attention_heads": row.heads for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": row.hidden for part in ("encoder", "decoder")},
        "dropout": row.dropout,
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "auxiliary_loss": False,
    }


def _depths(row: DETRConfig) -> tuple[int, int]:
    return row.encoder_depth, row.decoder_depth


def _hf_stages(row: Row, names: resnet.Names) -> list[Stage]:
    assert isinstance(row, DETRConfig)
    return [
        *resnet.stages(row.backbone, names, "inner.model.backbone.model."),
        Stage("projection", "projection", "inner.model.input_projection"),
        *(
            Stage(f"{stack}, block {i + 1}", f"{stack}.{i}", f"inner.model.{stack}.layers.{i}")
            for stack, depth in zip(("encoder", "decoder"), _depths(row), strict=True)
            for i in range(depth)
        ),
    ]


def _build_hf(row: Row, classes: int, names: resnet.Names) -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection

    described = {**_hf_config(row, classes, names), "num_labels": classes}
    try:
        model = DetrForObjectDetection(DetrConfig.from_dict(described))
    except ImportError as error:
        raise UserError(f"transformers builds this DETR on a ResNet of timm: {error}") from None
    return FileNamed(model, transformers_places(model), _outputs, {})


def _outputs(model: Any, images: Tensor) -> DetectionOutputs:
    """The heads of every block of the decoder, as in training; transformers gives the last alone.

    (What it gives of all with `auxiliary_loss` are those of another model: see `_refuse_auxiliary_loss`.)
    """
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: states.append(call[-1])) for block in model.model.decoder.layers]
    try:
        answer = model(pixel_values=images)
    finally:
        for hook in hooks:
            hook.remove()
    normed = [model.model.decoder.layernorm(state) for state in states[:-1]]
    before = [LayerOutputs(model.class_labels_classifier(x), model.bbox_predictor(x).sigmoid()) for x in normed]
    return DetectionOutputs((*before, LayerOutputs(answer.logits, answer.pred_boxes)))


def _loss(model: nn.Module, outputs: DetectionOutputs, targets: BoxTargets) -> ReferenceLoss:
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    assert isinstance(model, FileNamed)
    config: Any = model.inner.config
    matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion: Any = ImageLoss(matcher, config.num_labels, config.eos_coefficient, ["labels", "boxes"])
    exact = outputs.logits.new_ones(config.num_labels + 1)  # theirs is rounded to float32
    exact[-1] = config.eos_coefficient
    criterion.empty_weight = exact
    weights = {"class": 1.0, "l1": config.bbox_loss_coefficient, "giou": config.giou_loss_coefficient}
    return loss_by_layers(criterion, weights, outputs, targets)


PUBLISHED_EDGES = (800, 1333)


def side_by_edges(shortest: float, longest: float, stride: int) -> int:
    """Detectors bound the sides and keep the shape: the side of a square of as many pixels as a picture of 4:3 gets."""
    return max(1, round(min(shortest, longest * 3 / 4) * sqrt(4 / 3) / stride)) * stride


def edges(kind: str, given: PreprocessingConfig) -> dict[str, Any]:
    """The bounds of the sides that give a picture of 4:3 as many pixels as ours has; the longer is 5:3, as published.

    Ours knows its pixels as a multiple of the stride; of the bounds that mean the same, the published ones are written.
    `kind` is the class of transformers that reads it.
    """
    shortest = round(given.image_size * sqrt(3 / 4))
    longest = round(shortest * 5 / 3)
    if side_by_edges(*PUBLISHED_EDGES, given.stride) == given.image_size:
        shortest, longest = PUBLISHED_EDGES
    size = {"shortest_edge": shortest, "longest_edge": longest}
    return {"image_processor_type": kind, "size": size, "do_pad": True, "format": "coco_detection"}


# --- the original repository -----------------------------------------------------------------------------------------


ORIGINAL_BODY = "backbone.0.body."


def original_body(shapes: Shapes) -> ResNetConfig:
    """The backbone's row; that it is dilated is not to be seen."""
    return _frozen(resnet.plain_row(_below(shapes, ORIGINAL_BODY), {}))


def _original_rules(row: Row, classes: int) -> list[Rule]:
    assert isinstance(row, DETRConfig)
    stacks = (("encoder", row.encoder_depth, False), ("decoder", row.decoder_depth, True))
    return [
        *backbone_rules(row.backbone, resnet.TORCHVISION, ORIGINAL_BODY),
        *module("projection", "input_proj"),
        same("query_table", "query_embed.weight"),
        *(
            rule
            for stack, depth, cross in stacks
            for i in range(depth)
            for rule in block(f"{stack}.{i}", f"transformer.{stack}.layers.{i}", ORIGINAL, cross=cross)
        ),
        *module("norm", "transformer.decoder.norm"),
        *module("classes", "class_embed"),
        *box_head("boxes", "bbox_embed"),
    ]


def _original_row(shapes: Shapes, config: Mapping[str, Any]) -> DETRConfig:
    queries, dim = shapes["query_embed.weight"]
    return _row(
        original_body(shapes),
        dim=dim,
        heads=dim // HEAD_WIDTH,
        hidden=shapes["transformer.decoder.layers.0.linear1.weight"][0],
        depths=(depth_of(shapes, "transformer.encoder.layers."), depth_of(shapes, "transformer.decoder.layers.")),
        queries=queries,
        dropout=0.1,
    )


def _original_recognises(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    known = (
        f"{ORIGINAL_BODY}conv1.weight",
        "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
        "class_embed.weight",
        "bbox_embed.layers.2.weight",
        "query_embed.weight",
    )
    # its pre-norm form, which was never published, ends the encoder with a norm
    return all(name in shapes for name in known) and "transformer.encoder.norm.weight" not in shapes


def _hugging_face(names: resnet.Names, stem: str) -> Format:
    return Format(
        dialect="huggingface",
        family=DETRConfig.family,
        recognises=lambda shapes, config: _hf_recognises(shapes, config, stem),
        row=lambda shapes, config: _hf_row(shapes, config, names),
        classes=lambda shapes, config: shapes["class_labels_classifier.weight"][0] - 1,
        rules=lambda row, classes: _hf_rules(row, classes, names),
        stages=lambda row: _hf_stages(row, names),
        write_config=lambda row, classes: _hf_config(row, classes, names),
        ignored=COUNTS,
        peer=DetectorPeer(
            "transformers",
            lambda row, classes, config: _build_hf(row, classes, names),
            lambda model, images: model(images).logits,
            lambda model, images: model(images),
            _loss,
        ),
        preprocessing=PREPROCESSING,
        processor=lambda given: edges("DetrImageProcessor", given),
    )


FORMATS: tuple[Format, ...] = (
    _hugging_face(resnet.TIMM, "conv1"),
    _hugging_face(resnet.HUGGINGFACE, "embedder.embedder.convolution"),
    Format(
        dialect="original",
        family=DETRConfig.family,
        recognises=_original_recognises,
        row=_original_row,
        classes=lambda shapes, config: shapes["class_embed.weight"][0] - 1,
        rules=_original_rules,
        stages=lambda row: [],
        write_config=lambda row, classes: {},
        ignored=COUNTS,
        preprocessing=PREPROCESSING,
    ),
)

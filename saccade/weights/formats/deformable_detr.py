"""Deformable DETR as Hugging Face and its own repository name it.

Where boxes are not refined, all blocks of the decoder share one pair of heads, which a file holds once for each block,
or only once. Where they are, each block has its own; the decoder has them too, so a file holds them under two names, or
one of them. All names are written, any are read, and copies that differ are refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.resnet import ResNetConfig
from saccade.errors import UserError
from saccade.models.deformable_detr import FROM_BACKBONE, DeformableDETRConfig
from saccade.models.detector import BoxTargets, DetectionOutputs, LayerOutputs
from saccade.weights.formats import resnet
from saccade.weights.formats.detection_loss import loss_by_layers
from saccade.weights.formats.detr import (
    BODY,
    COUNTS,
    HEAD_WIDTH,
    ORIGINAL_BODY,
    PREPROCESSING,
    attention,
    backbone_rules,
    depth_of,
    edges,
    hf_body,
    hf_body_config,
    original_body,
    refuse_unsupported,
)
from saccade.weights.formats.reference import FileNamed, transformers_places
from saccade.weights.formats.table import (
    DetectorPeer,
    Format,
    ReferenceLoss,
    Rule,
    Shapes,
    Stage,
    State,
    copied,
    module,
    same,
)

CLASS_WEIGHT = 2  # in costs and loss, as published; transformers' own settings have 1


@dataclass(frozen=True)
class Names:
    """A dialect's names."""

    body: str
    projections: str
    transformer: str  # before all that is in the transformer
    queries: str
    cross_attention: str
    norm1: str
    norm2: str
    norm3: str
    encoder_norm1: str
    encoder_norm3: str
    up: str
    down: str
    packed: bool  # one matrix for queries, keys and values of self-attention


HUGGINGFACE = Names(
    body=BODY,
    projections="model.input_proj",
    transformer="model.",
    queries="model.query_position_embeddings.weight",
    cross_attention="encoder_attn",
    norm1="self_attn_layer_norm",
    norm2="encoder_attn_layer_norm",
    norm3="final_layer_norm",
    encoder_norm1="self_attn_layer_norm",
    encoder_norm3="final_layer_norm",
    up="fc1",
    down="fc2",
    packed=False,
)
# the decoder's norms are numbered in another order than they come in
ORIGINAL = Names(
    body=ORIGINAL_BODY,
    projections="input_proj",
    transformer="transformer.",
    queries="query_embed.weight",
    cross_attention="cross_attn",
    norm1="norm2",
    norm2="norm1",
    norm3="norm3",
    encoder_norm1="norm1",
    encoder_norm3="norm2",
    up="linear1",
    down="linear2",
    packed=True,
)


def deformable_attention(ours: str, theirs: str) -> list[Rule]:
    """A `DeformableAttention` of ours."""
    return [
        *module(f"{ours}.offsets", f"{theirs}.sampling_offsets"),
        *module(f"{ours}.weights", f"{theirs}.attention_weights"),
        *module(f"{ours}.value", f"{theirs}.value_proj"),
        *module(f"{ours}.out", f"{theirs}.output_proj"),
    ]


def _rules(row: Row, backbone: resnet.Names, names: Names) -> list[Rule]:
    assert isinstance(row, DeformableDETRConfig)
    t = names.transformer
    rules = backbone_rules(row.backbone, backbone, names.body)
    for i in range(row.levels):
        rules += module(f"projections.{i}.0", f"{names.projections}.{i}.0")
        rules += module(f"projections.{i}.1", f"{names.projections}.{i}.1")
    rules.append(same("level_table", f"{t}level_embed"))
    for i in range(row.encoder_depth):
        ours, theirs = f"encoder.{i}", f"{t}encoder.layers.{i}"
        rules += deformable_attention(f"{ours}.self_attention", f"{theirs}.self_attn")
        rules += module(f"{ours}.norm1", f"{theirs}.{names.encoder_norm1}")
        rules += module(f"{ours}.norm3", f"{theirs}.{names.encoder_norm3}")
        rules += _feed_forward(ours, theirs, names)
    for i in range(row.decoder_depth):
        ours, theirs = f"decoder.{i}", f"{t}decoder.layers.{i}"
        rules += attention(f"{ours}.self_attention", f"{theirs}.self_attn", packed_theirs=names.packed)
        rules += module(f"{ours}.norm1", f"{theirs}.{names.norm1}")
        rules += deformable_attention(f"{ours}.cross_attention", f"{theirs}.{names.cross_attention}")
        rules += module(f"{ours}.norm2", f"{theirs}.{names.norm2}")
        rules += module(f"{ours}.norm3", f"{theirs}.{names.norm3}")
        rules += _feed_forward(ours, theirs, names)
    if row.two_stage:
        rules += module("proposal.0", f"{t}enc_output") + module("proposal.1", f"{t}enc_output_norm")
        rules += module("proposal_query.0", f"{t}pos_trans") + module("proposal_query.1", f"{t}pos_trans_norm")
    else:
        rules += [same("query_table", names.queries), *module("reference", f"{t}reference_points")]
    return rules + _heads(row, names)


def _feed_forward(ours: str, theirs: str, names: Names) -> list[Rule]:
    return [*module(f"{ours}.mlp.up", f"{theirs}.{names.up}"), *module(f"{ours}.mlp.down", f"{theirs}.{names.down}")]


CLASSES, BOXES = "class_embed", "bbox_embed"


def _heads(row: DeformableDETRConfig, names: Names) -> list[Rule]:
    """Each of ours, and all places where theirs has it."""
    count = row.decoder_depth + row.two_stage
    rules: list[Rule] = []
    for kind, ours, inner in _PARTS_OF_HEADS:
        for i in range(count if row.refine else 1):
            theirs = [f"{kind}.{i}" for i in ([i] if row.refine else range(count))]
            if row.two_stage or (row.refine and kind == BOXES):
                theirs.append(f"{names.transformer}decoder.{kind}.{i}")
            for part in ("weight", "bias"):
                rules.append(copied(f"{ours.format(i)}.{part}", *(f"{each}{inner}.{part}" for each in theirs)))
    return rules


# kind, layer of ours, and where in theirs it is
_PARTS_OF_HEADS = [(CLASSES, "classes.{}", ""), *((BOXES, f"boxes.{{}}.{2 * k}", f".layers.{k}") for k in range(3))]


def _row(
    shapes: Shapes, config: Mapping[str, Any], names: Names, body: ResNetConfig, *, refine: bool
) -> DeformableDETRConfig:
    levels, dim = shapes[f"{names.transformer}level_embed"]
    heads = int(config.get("encoder_attention_heads", dim // HEAD_WIDTH))
    two_stage = f"{names.transformer}enc_output.weight" in shapes
    encoder, decoder = (f"{names.transformer}{part}.layers." for part in ("encoder", "decoder"))
    weights = f"{encoder}0.self_attn", f"{decoder}0.{names.cross_attention}"
    points = [shapes[f"{each}.attention_weights.weight"][0] // (heads * levels) for each in weights]
    usual = DeformableDETRConfig.queries
    return DeformableDETRConfig(
        image_size=body.image_size,
        backbone=body,
        dim=dim,
        heads=heads,
        hidden=shapes[f"{encoder}0.{names.up}.weight"][0],
        encoder_depth=depth_of(shapes, encoder),
        decoder_depth=depth_of(shapes, decoder),
        levels=levels,
        encoder_points=points[0],
        decoder_points=points[1],
        queries=int(config.get("two_stage_num_proposals", usual)) if two_stage else shapes[names.queries][0],
        refine=refine,
        two_stage=two_stage,
        dropout=float(config.get("dropout", 0.1)),
    )


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _hf_recognises(shapes: Shapes, config: Mapping[str, Any], stem: str) -> bool:
    known = (
        f"{BODY}{stem}.weight",
        "model.input_proj.0.1.weight",
        "model.level_embed",
        "model.encoder.layers.0.self_attn.sampling_offsets.weight",
        "model.decoder.layers.0.encoder_attn.sampling_offsets.weight",
        "model.decoder.layers.0.self_attn.q_proj.weight",
    )
    return all(name in shapes for name in known) and config.get("model_type", "deformable_detr") == "deformable_detr"


def _hf_row(shapes: Shapes, config: Mapping[str, Any], names: resnet.Names) -> DeformableDETRConfig:
    refuse_unsupported(config, "Deformable DETR")
    return _row(shapes, config, HUGGINGFACE, hf_body(shapes, config, names), refine=_hf_refines(shapes, config))


def _hf_refines(names: Shapes | State, config: Mapping[str, Any]) -> bool:
    return bool(config.get("with_box_refine", any(name.startswith(f"model.decoder.{BOXES}.") for name in names)))


def _hf_complete(state: State, config: Mapping[str, Any]) -> State:
    """With all the names of heads: a file has each tensor under one of its names, or all.

    One that has but the first head of several means that they are all the same; transformers shares those for classes
    even where boxes are refined, unless a file tells them apart.
    """
    found: dict[str, dict[str, Tensor]] = {}  # by what is the same wherever a head is: 3.weight, 3.layers.0.weight
    for name, tensor in state.items():
        if match := re.fullmatch(rf"(?:model\.decoder\.)?({CLASSES}|{BOXES})\.(\d+\..+)", name):
            found.setdefault(match[1], {}).setdefault(match[2], tensor)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    two_stage, refine = "model.enc_output.weight" in state, _hf_refines(state, config)
    result = dict(state)
    for kind, heads in found.items():
        inside = two_stage or (refine and kind == BOXES)
        for i in range(depth_of(shapes, "model.decoder.layers.") + two_stage):
            own = {name: tensor for name, tensor in heads.items() if name.startswith(f"{i}.")}
            if all(name.startswith("0.") for name in heads):
                own = {name.replace("0", str(i), 1): tensor for name, tensor in heads.items()}
            for name, tensor in own.items():
                for where in ("", "model.decoder.") if inside else ("",):
                    result.setdefault(f"{where}{kind}.{name}", tensor)
    return result


def _hf_config(row: Row, names: resnet.Names) -> dict[str, Any]:
    assert isinstance(row, DeformableDETRConfig)
    first = 5 - FROM_BACKBONE if row.levels > 1 else 4
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        **hf_body_config(row.backbone, names, list(range(first, 5))),
        "num_feature_levels": row.levels,
        "num_queries": row.queries,
        "with_box_refine": row.refine,
        "two_stage": row.two_stage,
        "two_stage_num_proposals": row.queries,
        "d_model": row.dim,
        **{f"{part}_layers": depth for part, depth in _depths(row).items()},
        **{f"{part}_attention_heads": row.heads for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": row.hidden for part in ("encoder", "decoder")},
        "encoder_n_points": row.encoder_points,
        "decoder_n_points": row.decoder_points,
        "dropout": row.dropout,
        "activation_function": "relu",
        "position_embedding_type": "sine",
    }


def _depths(row: DeformableDETRConfig) -> dict[str, int]:
    return {"encoder": row.encoder_depth, "decoder": row.decoder_depth}


def _hf_stages(row: Row, names: resnet.Names) -> list[Stage]:
    assert isinstance(row, DeformableDETRConfig)
    levels = [Stage(f"level {i + 1}", f"projections.{i}", f"inner.model.input_proj.{i}") for i in range(row.levels)]
    encoder, decoder = (
        [Stage(f"{part}, block {i + 1}", f"{part}.{i}", f"inner.model.{part}.layers.{i}") for i in range(depth)]
        for part, depth in _depths(row).items()
    )
    proposals = [
        Stage("proposals", "proposal", "inner.model.enc_output_norm"),
        Stage("queries of proposals", "proposal_query", "inner.model.pos_trans_norm"),
    ]
    body = resnet.stages(row.backbone, names, "inner.model.backbone.model.")
    return [*body, *levels, *encoder, *(proposals if row.two_stage else []), *decoder]


def _build_hf(row: Row, classes: int, names: resnet.Names) -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    assert isinstance(row, DeformableDETRConfig)
    described = {**_hf_config(row, names), "num_labels": classes, "auxiliary_loss": True}
    try:
        model = DeformableDetrForObjectDetection(DeformableDetrConfig.from_dict(described))
    except ImportError as error:
        raise UserError(f"transformers builds this Deformable DETR on a ResNet of timm: {error}") from None
    if row.refine and not row.two_stage:  # as it does when it loads heads that differ
        model.class_embed = nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
    return FileNamed(model, transformers_places(model), _outputs, {})


def _outputs(model: Any, images: Tensor) -> DetectionOutputs:
    """transformers gives the layers before the last beside its loss, so it is asked for that of no things at all."""
    nothing = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": images.new_zeros(0, 4)}
    answer = model(pixel_values=images, labels=[nothing] * len(images))
    layers = [LayerOutputs(each["logits"], each["pred_boxes"]) for each in answer.auxiliary_outputs]
    encoder = None
    if answer.enc_outputs_class is not None:
        encoder = LayerOutputs(answer.enc_outputs_class, answer.enc_outputs_coord_logits.sigmoid())
    return DetectionOutputs((*layers, LayerOutputs(answer.logits, answer.pred_boxes)), encoder)


def _loss(model: nn.Module, outputs: DetectionOutputs, targets: BoxTargets) -> ReferenceLoss:
    """transformers has none of proposals; its criterion judges them as it judges layers, as the published code does."""
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    assert isinstance(model, FileNamed)
    config: Any = model.inner.config
    matcher = DeformableDetrHungarianMatcher(CLASS_WEIGHT, config.bbox_cost, config.giou_cost)
    criterion = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    weights = {"class": CLASS_WEIGHT, "l1": config.bbox_loss_coefficient, "giou": config.giou_loss_coefficient}
    return loss_by_layers(criterion, weights, outputs, targets)


# --- the original repository -----------------------------------------------------------------------------------------


def _original_recognises(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    known = (
        f"{ORIGINAL_BODY}conv1.weight",
        "input_proj.0.1.weight",
        "transformer.level_embed",
        "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
        "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
        f"{CLASSES}.0.weight",
        f"{BOXES}.0.layers.2.weight",
    )
    return all(name in shapes for name in known)


def _original_row(shapes: Shapes, config: Mapping[str, Any]) -> DeformableDETRConfig:
    refine = f"transformer.decoder.{BOXES}.0.layers.0.weight" in shapes
    return _row(shapes, {}, ORIGINAL, original_body(shapes), refine=refine)


def _class_count(shapes: Shapes, config: Mapping[str, Any]) -> int:
    places = (f"{CLASSES}.0.weight", f"model.decoder.{CLASSES}.0.weight")
    return next(shapes[name][0] for name in places if name in shapes)


def _hugging_face(names: resnet.Names, stem: str) -> Format:
    return Format(
        dialect="huggingface",
        family=DeformableDETRConfig.family,
        recognises=lambda shapes, config: _hf_recognises(shapes, config, stem),
        row=lambda shapes, config: _hf_row(shapes, config, names),
        classes=_class_count,
        rules=lambda row, classes: _rules(row, names, HUGGINGFACE),
        stages=lambda row: _hf_stages(row, names),
        write_config=lambda row, classes: _hf_config(row, names),
        ignored=COUNTS,
        peer=DetectorPeer(
            "transformers",
            lambda row, classes, config: _build_hf(row, classes, names),
            lambda model, images: model(images).logits,
            lambda model, images: model(images),
            _loss,
        ),
        preprocessing=PREPROCESSING,
        processor=lambda given: edges("DeformableDetrImageProcessor", given),
        complete=_hf_complete,
    )


FORMATS: tuple[Format, ...] = (
    _hugging_face(resnet.TIMM, "conv1"),
    _hugging_face(resnet.HUGGINGFACE, "embedder.embedder.convolution"),
    Format(
        dialect="original",
        family=DeformableDETRConfig.family,
        recognises=_original_recognises,
        row=_original_row,
        classes=_class_count,
        rules=lambda row, classes: _rules(row, resnet.TORCHVISION, ORIGINAL),
        stages=lambda row: [],
        write_config=lambda row, classes: {},
        ignored=COUNTS,
        preprocessing=PREPROCESSING,
    ),
)

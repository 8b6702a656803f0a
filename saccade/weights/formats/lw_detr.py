"""LW-DETR and RF-DETR as transformers and their own repositories name them.

transformers saves an RF-DETR under the names of its own repository. Files of other versions have those of its modules,
with or without an older spelling of attention; all of these are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.windowed_vit import WindowedViTConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.models.detector import BoxTargets, DetectionOutputs, LayerOutputs
from saccade.models.lw_detr import LWDETRConfig, RFDETRConfig
from saccade.weights.formats.detection_loss import loss_by_layers
from saccade.weights.formats.lw_detr_names import (
    LW,
    LW_HF,
    LW_MODULES,
    LW_ORIGINAL,
    PAIRS,
    RF,
    RF_MODULES,
    RF_OLDER,
    RF_ORIGINAL,
    Spelling,
    body,
    lw_detr_rules,
    refuse_other_forms,
    whole_of,
)
from saccade.weights.formats.reference import FileNamed, transformers_places
from saccade.weights.formats.table import DetectorPeer, Format, NoWords, ReferenceLoss, Shapes, Stage
from saccade.weights.formats.vit_names import depth_of

ROWS = {LW: LWDETRConfig, RF: RFDETRConfig}
PREPROCESSING = PreprocessingConfig(image_size=640, stride=64, interpolation="bilinear")
HEAD_WIDTH, CROSS_HEAD_WIDTH = 32, 16  # of the published models; the original files do not say it
MASK_TOKEN = "*embeddings.mask_token"  # serves training without labels
# The first RF-DETR has a twelfth block after its last map, which gives nothing to the result.
IDLE, IDLE_BLOCK = 11, "*.encoder.layer.11.*"
COEFFICIENTS = {"class": "class", "l1": "bbox", "giou": "giou"}  # of the loss: ours and theirs

# --- reading ---------------------------------------------------------------------------------------------------------


def _recognises(shapes: Shapes, names: Spelling) -> bool:
    known = (
        f"{names.backbone.prefix}{names.backbone.patches}.weight",
        f"{names.mix.format(s=0)}.{names.entry}.{names.norm}.weight",
        f"{names.block.format(i=0)}.{names.qkv[0]}",
        f"{names.block.format(i=0)}.cross_attn.sampling_offsets.weight",
        f"{names.stage}enc_output.0.weight",
        names.tables[1],
        "class_embed.weight",
    )
    batch = f"{names.mix.format(s=0)}.{names.entry}.{names.norm}.running_mean" in shapes
    first_block = f"{names.backbone.prefix}{names.backbone.block.format(i=0)}"
    attention = f"{first_block}.{names.backbone.qkv[0].replace('*', 'weight')}"
    masks = any("segmentation" in name for name in shapes)
    return all(name in shapes for name in (*known, attention)) and batch == (names.kind == LW) and not masks


def _plain_row(shapes: Shapes, names: Spelling) -> LWDETRConfig:
    """What shapes tell, and else as published."""
    p = names.backbone.prefix
    dim, _, patch, _ = shapes[f"{p}{names.backbone.patches}.weight"]
    rows = shapes[p + names.backbone.positions][1] - 1
    depth = depth_of(shapes, p + names.backbone.block.format(i=""))
    groups = depth_of(shapes, f"{names.stage}enc_output.")
    width = shapes["class_embed.weight"][1]
    first = names.block.format(i=0)
    scales = (2.0, 0.5) if names.mix.format(s=1) + f".{names.entry}.conv.weight" in shapes else (1.0,)
    cross_heads = width // CROSS_HEAD_WIDTH
    up = next(theirs for ours, theirs in names.parts if ours == "mlp.up")
    backbone = WindowedViTConfig(
        dim=dim,
        depth=depth,
        heads=12 if names.kind == LW else dim // 64,
        hidden=4 * dim,
        patch_size=patch,
        grid=isqrt(rows),
        whole=(),
        taken=(depth,),
        layer_scale=0.1 if names.kind == LW else 1.0,
        key_bias=names.kind == RF,
        class_token=names.kind == RF,
        norm=names.kind == RF,
        resize="bicubic" if names.kind == LW else "antialias",
    )
    return ROWS[names.kind](
        backbone=backbone,
        dim=width,
        heads=width // HEAD_WIDTH,
        cross_heads=cross_heads,
        points=shapes[f"{first}.cross_attn.attention_weights.bias"][0] // (cross_heads * len(scales)),
        hidden=shapes[f"{first}.{up}.weight"][0],
        decoder_depth=depth_of(shapes, names.block.format(i="")),
        queries=shapes[names.tables[1]][0] // groups,
        groups=groups,
        scales=scales,
    )


def _published_form(shapes: Shapes, names: Spelling) -> LWDETRConfig:
    """Windows and maps leave no trace in the weights: those of the published models."""
    row = _plain_row(shapes, names)
    b = body(row)
    if names.kind == LW:
        forms = {6: ((1, 3, 5), (2, 4, 6)), 10: ((2, 4, 5, 8), (3, 5, 6, 10))}
        if b.depth not in forms:
            raise UserError(f"no LW-DETR of {b.depth} blocks was published; it can be read only with its config.json")
        return _sized(replace(row, backbone=replace(b, whole=forms[b.depth][0], taken=forms[b.depth][1])))
    taken, windows = ((2, 5, 8, 11), 4) if b.patch_size == 14 else ((3, 6, 9, 12), 2)
    b = replace(b, depth=taken[-1], taken=taken, windows=windows, whole=whole_of(taken, taken[-1]))
    return _sized(replace(row, backbone=b))


def _sized(row: LWDETRConfig) -> LWDETRConfig:
    """RF-DETR was published for as many patches as it has positions, or a little more; LW-DETR for pictures of 640."""
    b = body(row)
    size = 640 if row.norm == "batch" else -(-b.grid * b.patch_size // b.stride) * b.stride
    return replace(row, image_size=size, backbone=replace(b, image_size=size))


def _row(shapes: Shapes, config: Mapping[str, Any], names: Spelling) -> LWDETRConfig:
    """Where a config.json says nothing, classes of transformers have these usual values."""
    if not config:
        return _published_form(shapes, names)
    given = config.get("backbone_config") or {}
    _refuse_unsupported(config, given)
    row = _plain_row(shapes, names)
    b = body(row)
    stages = given.get("out_features")
    taken = tuple(map(int, given["out_indices"] if stages is None else (each.removeprefix("stage") for each in stages)))
    if names.kind == LW:
        windows = isqrt(given.get("num_windows", 16))
        whole = tuple(i for i in range(taken[-1]) if i not in given.get("window_block_indices", ()))
    else:
        windows, whole = given.get("num_windows", 4), whole_of(taken, taken[-1])
    if b.depth != taken[-1] and (names.kind, b.depth - 1, taken[-1]) != (RF, IDLE, IDLE):
        raise UserError(f"config.json: maps after {taken} of {b.depth} blocks; those after the last map would be idle")
    scale = given.get("cae_init_values", 0.1) if names.kind == LW else given.get("layerscale_value", 1.0)
    b = replace(
        b,
        depth=taken[-1],
        taken=taken,
        windows=windows,
        whole=whole,
        heads=given.get("num_attention_heads", 12),
        layer_scale=float(scale),
        norm_eps=float(given.get("layer_norm_eps", 1e-6)),
        drop_path=float(given.get("drop_path_rate", 0.0)),
    )
    return _sized(
        replace(
            row,
            backbone=b,
            heads=config.get("decoder_self_attention_heads", 8),
            cross_heads=config.get("decoder_cross_attention_heads", 16),
            points=config.get("decoder_n_points", 4),
            scales=tuple(config["projector_scale_factors"]) if names.kind == LW else (1.0,),
            norm_eps=float(config.get("layer_norm_eps", 1e-5)),
            dropout=float(config.get("dropout", 0.0 if names.kind == LW else 0.1)),
        )
    )


def _refuse_unsupported(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> None:
    standard = {
        "activation_function": "silu",
        "decoder_activation_function": "relu",
        "attention_bias": True,
        "hidden_expansion": 0.5,
        "c2f_num_blocks": PAIRS,
        "batch_norm_eps": 1e-5,
        "num_feature_levels": 1 if config.get("model_type") == RF else len(config.get("projector_scale_factors", ())),
    }
    of_backbone = {
        "hidden_act": "gelu",
        "mlp_ratio": 4,
        "qkv_bias": True,
        "num_channels": 3,
        "use_absolute_position_embeddings": True,
        "use_swiglu_ffn": False,
        "apply_layernorm": True,
    }
    for described, usual, where in ((config, standard, ""), (backbone, of_backbone, "backbone_config.")):
        for name, value in usual.items():
            if described.get(name, value) != value:
                raise UserError(f"config.json: {where}{name} = {described[name]!r} is not supported, only {value!r}")


# --- writing and building --------------------------------------------------------------------------------------------


def _hf_config(row: Row, classes: int, kind: str) -> dict[str, Any]:
    assert isinstance(row, LWDETRConfig)
    refuse_other_forms(row, kind)
    b = body(row)
    if b.hidden != 4 * b.dim:
        raise NoWords(f"transformers has no {kind} with a feed-forward width of {b.hidden} for {b.dim} channels")
    backbone: dict[str, Any] = {
        "model_type": {LW: "lw_detr_vit", RF: "rf_detr_dinov2"}[kind],
        "hidden_size": b.dim,
        "num_hidden_layers": b.depth,
        "num_attention_heads": b.heads,
        "mlp_ratio": 4,
        "patch_size": b.patch_size,
        "layer_norm_eps": b.norm_eps,
    }
    values: dict[str, Any] = {
        "architectures": [{LW: "LwDetrForObjectDetection", RF: "RfDetrForObjectDetection"}[kind]],
        "model_type": kind,
        "backbone_config": backbone,
        "d_model": row.dim,
        "num_queries": row.queries,
        "group_detr": row.groups,
        "decoder_layers": row.decoder_depth,
        "decoder_self_attention_heads": row.heads,
        "decoder_cross_attention_heads": row.cross_heads,
        "decoder_n_points": row.points,
        "decoder_ffn_dim": row.hidden,
        "dropout": row.dropout,
        "auxiliary_loss": True,
    }
    if kind == LW:
        windowed = [i for i in range(b.depth) if i not in b.whole]
        backbone |= {"num_windows": b.windows**2, "window_block_indices": windowed, "out_indices": list(b.taken)}
        backbone |= {"pretrain_image_size": b.grid * b.patch_size, "image_size": 1024, "cae_init_values": b.layer_scale}
        return values | {"projector_scale_factors": list(row.scales)}
    backbone |= {"num_windows": b.windows, "out_features": [f"stage{i}" for i in b.taken], "use_mask_token": False}
    backbone |= {"image_size": b.grid * b.patch_size, "layerscale_value": b.layer_scale}
    return values | {"layer_norm_eps": row.norm_eps, "num_feature_levels": 1}


def _build(row: Row, classes: int, names: Spelling) -> nn.Module:
    import transformers

    described = {**_hf_config(row, classes, names.kind), "num_labels": classes}
    (architecture,) = described.pop("architectures")
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class.from_dict(described))
    if names.respelt is None:
        places = transformers_places(model)
    else:
        places = {_respelt(name, names.respelt): (name,) for name in model.state_dict()}
    return FileNamed(model, places, _outputs, {})


def _respelt(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for one, other in pairs:
        name = name.replace(one, other)
    return name


def _outputs(model: Any, images: Tensor) -> DetectionOutputs:
    from transformers.models.lw_detr.modeling_lw_detr import refine_bboxes

    if model.config.model_type == RF and images.shape[2] != images.shape[3]:
        raise UserError(
            "transformers cuts the windows of a picture that is not square out of places that do not belong together; "
            "compare an RF-DETR on squares"
        )
    body = model.config.backbone_config
    scales = getattr(model.config, "projector_scale_factors", (1.0,))
    places = images.shape[2] * images.shape[3] / body.patch_size**2 * sum(scale**2 for scale in scales)
    if places < model.config.num_queries:
        raise UserError(
            f"transformers needs a place for each of its {model.config.num_queries} queries, and pictures of "
            f"{images.shape[2]} x {images.shape[3]} pixels have {places:.0f}; compare larger ones"
        )
    answer = model(pixel_values=images)
    states = answer.intermediate_hidden_states[:-1]  # of the blocks before the last, normed
    boxes = refine_bboxes(answer.intermediate_reference_points, model.bbox_embed(states))
    before = map(LayerOutputs, model.class_embed(states), boxes)
    proposals = LayerOutputs(answer.enc_outputs_class, answer.enc_outputs_coord_logits)
    return DetectionOutputs((*before, LayerOutputs(answer.logits, answer.pred_boxes)), proposals)


class Criterion:
    """Theirs, for one group."""

    def __init__(self, config: Any):
        from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

        self.matcher_of_groups = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        of = (config.num_labels, config.focal_alpha, ["labels", "boxes"], config.group_detr)
        self.inner = LwDetrImageLoss(self.matcher_of_groups, *of).eval()

    def __call__(self, outputs: Any, labels: Any) -> Any:
        return self.inner(outputs, labels)

    def matcher(self, outputs: Any, labels: Any) -> Any:
        return self.matcher_of_groups(outputs, labels, 1)


def _loss(model: nn.Module, outputs: DetectionOutputs, targets: BoxTargets) -> ReferenceLoss:
    assert isinstance(model, FileNamed)
    config: Any = model.inner.config
    weights = {name: float(getattr(config, f"{their}_loss_coefficient")) for name, their in COEFFICIENTS.items()}
    return loss_by_layers(Criterion(config), weights, outputs, targets, proposals_of_classes=True)


def _stages(row: Row, kind: str) -> list[Stage]:
    assert isinstance(row, LWDETRConfig)
    inner = "inner.model.backbone"
    patches = {LW: "embeddings.projection", RF: "embeddings.patch_embeddings.projection"}[kind]
    levels = {LW: f"{inner}.projector.scale_layers.{{s}}", RF: f"{inner}.projector"}[kind]
    return [
        Stage("patches", "backbone.patches", f"{inner}.backbone.{patches}"),
        *(
            Stage(f"block {i}", f"backbone.blocks.{i}", f"{inner}.backbone.encoder.layer.{i}", _tokens, _tokens)
            for i in range(body(row).depth)
        ),
        *(Stage(f"level {s + 1}", f"projectors.{s}", levels.format(s=s)) for s in range(len(row.scales))),
        *(
            Stage(f"decoder, block {i + 1}", f"decoder.{i}", f"inner.model.decoder.layers.{i}", _tokens, _tokens)
            for i in range(row.decoder_depth)
        ),
    ]


def _tokens(output: Tensor) -> Tensor:
    """Whatever they are grouped by."""
    return output.flatten(0, -2)


def _processor(given: PreprocessingConfig, kind: str) -> dict[str, Any]:
    """Their readers squash pictures to squares."""
    side = {"height": given.image_size, "width": given.image_size}
    reader = {LW: "DeformableDetrImageProcessor", RF: "DetrImageProcessor"}[kind]
    return {"image_processor_type": reader, "size": side, "do_pad": True, "format": "coco_detection"}


# --- formats ---------------------------------------------------------------------------------------------------------


def _format(dialect: str, names: Spelling, stated: tuple[str | None, ...], *, idle: bool = False) -> Format:
    """`stated`: what a config.json may say that it is; none where there is none. `idle`: with a block of no use."""
    kind = names.kind
    peer = DetectorPeer(
        "transformers",
        lambda row, classes, config: _build(row, classes, names),
        lambda model, images: model(images).logits,
        lambda model, images: model(images),
        _loss,
    )

    def recognises(shapes: Shapes, config: Mapping[str, Any]) -> bool:
        if config.get("model_type") not in stated or not _recognises(shapes, names):
            return False
        last = f"{names.backbone.prefix}{names.backbone.block.format(i=IDLE)}."
        has_last = kind == RF and any(name.startswith(last) for name in shapes)
        return idle == (has_last and body(_row(shapes, config, names)).depth == IDLE)

    return Format(
        dialect=dialect,
        family=kind,
        recognises=recognises,
        row=lambda shapes, config: _row(shapes, config, names),
        classes=lambda shapes, config: shapes["class_embed.weight"][0],
        rules=lambda row, classes: lw_detr_rules(row, classes, names),
        stages=lambda row: _stages(row, kind) if names.runs else [],
        write_config=lambda row, classes: _hf_config(row, classes, kind),
        ignored=(MASK_TOKEN, IDLE_BLOCK) if idle else (MASK_TOKEN,) if kind == RF else (),
        peer=peer if names.runs else None,
        preprocessing=PREPROCESSING,
        processor=lambda given: _processor(given, kind),
    )


FORMATS: tuple[Format, ...] = (
    _format("huggingface", LW_HF, (LW, None)),
    _format("huggingface", LW_MODULES, (LW, None)),
    _format("original", LW_ORIGINAL, (None,)),
    *(
        _format(dialect, names, stated, idle=idle)
        for dialect, names, stated in (
            ("huggingface", RF_ORIGINAL, (RF,)),
            ("huggingface", RF_MODULES, (RF, None)),
            ("huggingface", RF_OLDER, (RF, None)),
            ("original", RF_ORIGINAL, (None,)),
        )
        for idle in (False, True)
    ),
)

"""What LW-DETR and RF-DETR are made of, and what each of their tensors is called in every dialect."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from saccade.backbones.base import Row
from saccade.backbones.vit import ViTConfig
from saccade.backbones.windowed_vit import WindowedViTConfig
from saccade.layers.projector import WIDE
from saccade.models.lw_detr import LWDETRConfig
from saccade.weights.formats.detr import box_head
from saccade.weights.formats.table import NoWords, Rule, module, packed, same
from saccade.weights.formats.vit_names import Names, vit_rules

LW, RF = "lw_detr", "rf_detr"  # as transformers calls them
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
PAIRS = 3  # of convolutions in the projector


@dataclass(frozen=True)
class Spelling:
    """A dialect's names. {s} counts levels, {m} maps, {i} blocks, {g} groups, {j} pairs of convolutions, {k} parts."""

    kind: str  # LW or RF
    backbone: Names
    mix: str  # of the projector
    entry: str
    pair: str
    out: str
    norm: str  # of its convolutions
    level_norm: str
    resize: str  # part {k} of the layers that resize map {m}
    block: str
    qkv: tuple[str, ...]  # of the decoder's self-attention: matrices, then biases; all in one, or three of each
    parts: tuple[tuple[str, str], ...]  # of a block: ours, theirs
    last_norm: str
    query_positions: str
    stage: str  # before what belongs to proposals
    tables: tuple[str, str]  # of queries and references
    # How names of transformers' modules are spelt; none: as transformers itself does when it saves
    respelt: tuple[tuple[str, str], ...] | None = None
    runs: bool = True  # transformers can be given such a file


_CROSS = (
    ("cross_attention.value", "cross_attn.value_proj"),
    ("cross_attention.offsets", "cross_attn.sampling_offsets"),
    ("cross_attention.weights", "cross_attn.attention_weights"),
    ("cross_attention.out", "cross_attn.output_proj"),
)
_MODULES_PARTS = (
    ("self_attention.out", "self_attn.o_proj"),
    ("norm1", "self_attn_layer_norm"),
    *_CROSS,
    ("norm2", "cross_attn_layer_norm"),
    ("mlp.up", "mlp.fc1"),
    ("mlp.down", "mlp.fc2"),
    ("norm3", "layer_norm"),
)
_ORIGINAL_PARTS = (
    ("self_attention.out", "self_attn.out_proj"),
    ("norm1", "norm1"),
    *_CROSS,
    ("norm2", "norm2"),
    ("mlp.up", "linear1"),
    ("mlp.down", "linear2"),
    ("norm3", "norm3"),
)
_BODY = Names(
    patches="embeddings.projection",
    class_tokens=("embeddings.none",),  # there is a place for one in the table of positions, but none
    registers="",
    positions="embeddings.position_embeddings",
    block="encoder.layer.{i}",
    norms=("layernorm_before.*", "layernorm_after.*"),
    qkv=tuple(f"attention.attention.{name}.*" for name in ("query", "key", "value")),
    out="attention.output.*",
    mlp=("intermediate.fc1.*", "intermediate.fc2.*"),
    gate_up=(),
    gate_down="",
    scales=("gamma_1", "gamma_2"),
    norm="",
    head=(),
    prefix="model.backbone.backbone.",
)
_DINOV2_BODY = replace(
    _BODY,
    patches="embeddings.patch_embeddings.projection",
    class_tokens=("embeddings.cls_token",),
    norms=("norm1.*", "norm2.*"),
    out="attention.output.dense.*",
    mlp=("mlp.fc1.*", "mlp.fc2.*"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    norm="layernorm",
)
_SHORT: dict[str, Any] = {"qkv": tuple(f"attention.{name}_proj.*" for name in "qkv"), "out": "attention.o_proj.*"}

LW_HF = Spelling(
    kind=LW,
    backbone=_BODY,
    mix="model.backbone.projector.scale_layers.{s}.projector_layer",
    entry="conv1",
    pair="bottlenecks.{j}.conv{k}",
    out="conv2",
    norm="norm",
    level_norm="model.backbone.projector.scale_layers.{s}.layer_norm",
    resize="model.backbone.projector.scale_layers.{s}.sampling_layers.{m}.layers.{k}",
    block="model.decoder.layers.{i}",
    qkv=tuple(f"self_attn.{name}_proj.{each}" for each in ("weight", "bias") for name in "qkv"),
    parts=_MODULES_PARTS,
    last_norm="model.decoder.layernorm",
    query_positions="model.decoder.ref_point_head",
    stage="model.",
    tables=("model.query_feat.weight", "model.reference_point_embed.weight"),
)
LW_ORIGINAL = Spelling(
    kind=LW,
    backbone=replace(
        _BODY,
        patches="patch_embed.proj",
        positions="pos_embed",
        block="blocks.{i}",
        norms=("norm1.*", "norm2.*"),
        qkv=("attn.qkv.*",),
        biases=("attn.q_bias", "attn.v_bias"),
        out="attn.proj.*",
        mlp=("mlp.fc1.*", "mlp.fc2.*"),
        prefix="backbone.0.encoder.",
    ),
    mix="backbone.0.projector.stages.{s}.0",
    entry="cv1",
    pair="m.{j}.cv{k}",
    out="cv2",
    norm="bn",
    level_norm="backbone.0.projector.stages.{s}.1",
    resize="backbone.0.projector.stages_sampling.{s}.{m}.{k}",
    block="transformer.decoder.layers.{i}",
    qkv=("self_attn.in_proj_weight", "self_attn.in_proj_bias"),
    parts=_ORIGINAL_PARTS,
    last_norm="transformer.decoder.norm",
    query_positions="transformer.decoder.ref_point_head",
    stage="transformer.",
    tables=("query_feat.weight", "refpoint_embed.weight"),
    runs=False,
)
LW_MODULES = replace(LW_HF, backbone=replace(_BODY, **_SHORT), respelt=())
RF_ORIGINAL = replace(
    LW_ORIGINAL, kind=RF, backbone=replace(_DINOV2_BODY, prefix="backbone.0.encoder.encoder."), runs=True
)
RF_MODULES = replace(
    LW_MODULES,
    kind=RF,
    backbone=replace(_DINOV2_BODY, **_SHORT),
    mix="model.backbone.projector.projector_layer",
    level_norm="model.backbone.projector.layer_norm",
)
RF_OLDER = replace(
    RF_MODULES,
    backbone=_DINOV2_BODY,
    respelt=(
        *((f"attention.{name[0]}_proj", f"attention.attention.{name}") for name in ("query", "key", "value")),
        ("attention.o_proj", "attention.output.dense"),
    ),
)


# --- rules -----------------------------------------------------------------------------------------------------------


def body(row: LWDETRConfig) -> WindowedViTConfig:
    if not isinstance(row.backbone, WindowedViTConfig):
        raise NoWords(f"an LW-DETR of others has a ViT in windows as its backbone, not a {row.backbone.family}")
    return row.backbone


def lw_detr_rules(row: Row, classes: int, names: Spelling) -> list[Rule]:
    assert isinstance(row, LWDETRConfig)
    refuse_other_forms(row, names.kind)
    top = names.stage
    rules = _backbone_rules(row, names)
    for s in range(len(row.scales)):
        rules += _projector_rules(row, names, s)
    for i in range(row.decoder_depth):
        rules += _block_rules(f"decoder.{i}", names.block.format(i=i), names)
    for g in range(row.groups):
        rules += [
            *module(f"proposers.{g}.entry.0", f"{top}enc_output.{g}"),
            *module(f"proposers.{g}.entry.1", f"{top}enc_output_norm.{g}"),
            *module(f"proposers.{g}.classes", f"{top}enc_out_class_embed.{g}"),
            *box_head(f"proposers.{g}.boxes", f"{top}enc_out_bbox_embed.{g}"),
        ]
    return [
        *rules,
        same("query_table", names.tables[0]),
        same("reference_table", names.tables[1]),
        *box_head("query_positions", names.query_positions, 2),
        *module("norm", names.last_norm),
        *module("classes", "class_embed"),
        *box_head("boxes", "bbox_embed"),
    ]


def _backbone_rules(row: LWDETRConfig, names: Spelling) -> list[Rule]:
    """Those of a plain ViT. The place of a class token that is not there carries nothing."""
    b = body(row)
    plain = ViTConfig(
        dim=b.dim,
        depth=b.depth,
        heads=b.heads,
        hidden=b.hidden,
        patch_size=b.patch_size,
        image_size=b.grid * b.patch_size,
        layer_scale=b.layer_scale,
        key_bias=b.key_bias,
    )
    absent = [] if b.norm else ["backbone.norm."]
    absent += [] if b.class_token else ["backbone.class_token"]
    return [rule for rule in vit_rules(plain, 0, names.backbone) if not rule.ours.startswith(tuple(absent))]


def _projector_rules(row: LWDETRConfig, names: Spelling, s: int) -> list[Rule]:
    ours, theirs = f"projectors.{s}.mix", names.mix.format(s=s)
    convs = [("entry", names.entry), ("out", names.out)]
    convs += [(f"pairs.{j}.{k}", names.pair.format(j=j, k=k + 1)) for j in range(PAIRS) for k in range(2)]
    rules = [rule for one, other in convs for rule in _conv(row, f"{ours}.{one}", f"{theirs}.{other}", names)]
    for m in range(len(body(row).taken)):
        for k, enlarges in enumerate(_resizing(body(row).dim, row.scales[s])):
            own, other = f"projectors.{s}.resizes.{m}.{k}", names.resize.format(s=s, m=m, k=k)
            rules += module(own, other) if enlarges else _conv(row, own, other, names)
    return rules + module(f"projectors.{s}.norm", names.level_norm.format(s=s))


def _resizing(width: int, scale: float) -> list[bool]:
    """Of each layer that brings a map to a scale, whether it is the one that enlarges."""
    if scale == 2.0:
        return [False, True] if width > WIDE else [True]
    return [False] if scale == 0.5 else []


def _conv(row: LWDETRConfig, ours: str, theirs: str, names: Spelling) -> list[Rule]:
    statistics = STATISTICS if row.norm == "batch" else ()
    return [
        same(f"{ours}.conv.weight", f"{theirs}.conv.weight"),
        *module(f"{ours}.norm", f"{theirs}.{names.norm}", "weight", "bias", *statistics),
    ]


def _block_rules(ours: str, theirs: str, names: Spelling) -> list[Rule]:
    half = len(names.qkv) // 2
    rules = [rule for one, other in names.parts for rule in module(f"{ours}.{one}", f"{theirs}.{other}")]
    for each, found in (("weight", names.qkv[:half]), ("bias", names.qkv[half:])):
        rules.append(packed(f"{ours}.self_attention.qkv.{each}", *(f"{theirs}.{name}" for name in found)))
    return rules


def refuse_other_forms(row: LWDETRConfig, kind: str) -> None:
    """Each of the two is a corner of what a row can say."""
    b = body(row)
    found = (row.norm, b.norm, b.class_token, b.key_bias, b.resize, b.mlp, b.layer_scale is not None)
    usual = {LW: ("batch", False, False, False, "bicubic"), RF: ("layer", True, True, True, "antialias")}[kind]
    fits = kind == LW or (row.scales == (1.0,) and b.whole == whole_of(b.taken, b.depth))
    if found != (*usual, "gelu", True) or not fits:
        raise NoWords(f"no {kind} of transformers is like this one ({row.about})")


def whole_of(taken: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The blocks of an RF-DETR that attend to the whole picture: those that follow a map."""
    return tuple(i for i in range(depth) if i in taken)

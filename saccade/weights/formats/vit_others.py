"""The ViT family as torchvision and the original repositories name it.

The authors of DeiT and DINO used names that timm still has: their files are read as timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.vit import ViTConfig
from saccade.config import PreprocessingConfig
from saccade.layers.feedforward import SWIGLU
from saccade.weights.formats.reference import FileNamed
from saccade.weights.formats.table import Format, NoWords, Peer, Rule, Shapes, Stage
from saccade.weights.formats.vit_names import (
    Names,
    depth_of,
    grid_side,
    likely_heads,
    meant,
    shape_of,
    vit_rules,
    vit_stages,
)
from saccade.weights.formats.vit_timm import PLAIN as TIMM_NAMES

# --- torchvision -----------------------------------------------------------------------------------------------------

TORCHVISION_NAMES = Names(
    patches="conv_proj",
    class_tokens=("class_token",),
    registers="",
    positions="encoder.pos_embedding",
    block="encoder.layers.encoder_layer_{i}",
    norms=("ln_1.*", "ln_2.*"),
    qkv=("self_attention.in_proj_*",),
    out="self_attention.out_proj.*",
    mlp=("mlp.0.*", "mlp.3.*"),
    gate_up=(),
    gate_down="",
    scales=("", ""),
    norm="encoder.ln",
    head=("heads.head",),
)
TORCHVISION_1_NAMES = replace(TORCHVISION_NAMES, mlp=("mlp.linear_1.*", "mlp.linear_2.*"))  # its published files


def torchvision_rules(row: Row, classes: int, names: Names) -> list[Rule]:
    assert isinstance(row, ViTConfig)
    plain = row.pool == "token" and not row.registers and row.position == "learned" and not row.pre_norm
    if not plain or row.norm_pooled or row.mlp != "gelu" or not (row.qkv_bias and row.key_bias) or row.projection:
        raise NoWords("torchvision has no ViT of this form, only the plain one")
    return vit_rules(replace(row, class_position=True), classes, names)


def torchvision_row(shapes: Shapes, names: Names) -> ViTConfig:
    dim, _, patch_size, _ = shape_of(shapes, "conv_proj.weight")
    side, _ = grid_side(shape_of(shapes, names.positions)[1] - 1, 0)
    first = f"{names.block.format(i=0)}.{names.mlp[0]}".replace("*", "weight")
    return ViTConfig(
        dim=dim,
        depth=depth_of(shapes, names.block.format(i="")),
        heads=likely_heads(dim),
        hidden=shape_of(shapes, first)[0],
        patch_size=patch_size,
        image_size=side * patch_size,
    )


def _is_torchvision(shapes: Shapes, names: Names) -> bool:
    return {"conv_proj.weight", f"{names.block.format(i=0)}.{names.mlp[0]}".replace("*", "weight")} <= shapes.keys()


def torchvision_stages(row: Row) -> list[Stage]:
    assert isinstance(row, ViTConfig)
    return vit_stages(row, TORCHVISION_NAMES, "inner.")


def build_torchvision(row: Row, classes: int, config: Mapping[str, Any], names: Names) -> nn.Module:
    """It takes pictures of the one size alone."""
    from torchvision.models.vision_transformer import VisionTransformer

    assert isinstance(row, ViTConfig)
    inner = VisionTransformer(
        image_size=row.side * row.patch_size,
        patch_size=row.patch_size,
        num_layers=row.depth,
        num_heads=row.heads,
        hidden_dim=row.dim,
        mlp_dim=row.hidden,
        num_classes=classes or 1,
        norm_layer=partial(nn.LayerNorm, eps=row.norm_eps),
    )
    if not classes:
        inner.heads = nn.Sequential()
    renames = dict(zip((n[:-2] for n in TORCHVISION_NAMES.mlp), (n[:-2] for n in names.mlp), strict=True))
    places: dict[str, tuple[str, ...]] = {}
    for name in inner.state_dict():
        found = next((mlp for mlp in renames if f".{mlp}." in name), None)
        places[name if found is None else name.replace(f".{found}.", f".{renames[found]}.")] = (name,)
    return FileNamed(inner, places, lambda model, images: model(images), {})


def _torchvision(names: Names) -> Format:
    return Format(
        dialect="torchvision",
        family=ViTConfig.family,
        recognises=lambda shapes, config: _is_torchvision(shapes, names),
        row=lambda shapes, config: torchvision_row(shapes, names),
        classes=lambda shapes, config: shapes["heads.head.weight"][0] if "heads.head.weight" in shapes else 0,
        rules=lambda row, classes: torchvision_rules(row, classes, names),
        stages=torchvision_stages,
        write_config=lambda row, classes: {},
        peer=Peer(
            "torchvision",
            lambda row, classes, config: build_torchvision(row, classes, config, names),
            lambda model, images: model(images),
        ),
        preprocessing=PreprocessingConfig(crop=0.875, interpolation="bilinear"),
        meant=meant,
    )


# --- the authors of DINOv2, DeiT III and DINOv3 ----------------------------------------------------------------------

DINOV2_NAMES = replace(
    TIMM_NAMES,
    registers="register_tokens",
    gate_up=("mlp.w12.*",),
    gate_down="mlp.w3.*",
    register_positions=False,
    pre_norm="",
    pooled_norm="",
    pooling="",
    head=("head",),
)
DINOV2_QUARTERS_NAMES = replace(DINOV2_NAMES, block="blocks.{c}.{i}")  # as saved in training
DEIT3_NAMES = replace(DINOV2_NAMES, registers="", gate_up=(), gate_down="", scales=("gamma_1", "gamma_2"))
DINOV3_NAMES = replace(DINOV2_NAMES, registers="storage_tokens", gate_up=("mlp.w1.*", "mlp.w2.*"), gate_down="mlp.w3.*")


def original_rules(row: Row, classes: int, names: Names, *, class_position: bool, rotary: bool) -> list[Rule]:
    assert isinstance(row, ViTConfig)
    if row.pool != "token" or row.norm_pooled or (row.position == "rotary") != rotary or row.projection:
        raise NoWords("the original repository has no model of this form")
    return vit_rules(replace(row, class_position=class_position), classes, names)


def original_row(shapes: Shapes, names: Names) -> ViTConfig:
    """Heads are taken to be 64 wide, but for sizes known to differ."""
    dim, _, patch_size, _ = shape_of(shapes, "patch_embed.proj.weight")
    rotary = "pos_embed" not in shapes
    registers = shapes[names.registers][1] if names.registers in shapes else 0
    quarters = "{c}" in names.block
    block = names.block.format(c=0, i=0)
    gated = names.gate_down != "" and f"{block}.{names.gate_down}".replace("*", "weight") in shapes
    down = names.gate_down if gated else names.mlp[1]
    side, class_position = (0, True) if rotary else grid_side(shapes["pos_embed"][1], 1)
    depth = (
        len({name.split(".")[2] for name in shapes if name.startswith("blocks.") and name.split(".")[2].isdigit()})
        if quarters
        else depth_of(shapes, "blocks.")
    )
    return ViTConfig(
        dim=dim,
        depth=depth,
        heads=likely_heads(dim, rotary=rotary),
        hidden=shape_of(shapes, f"{block}.{down}".replace("*", "weight"))[1],
        patch_size=patch_size,
        image_size=256 if rotary else side * patch_size,
        position="rotary" if rotary else "learned",
        resize="antialias" if registers or names is DEIT3_NAMES else "offset",
        class_position=class_position,
        registers=registers,
        layer_scale=1e-6 if names is DEIT3_NAMES else 1e-5,
        mlp=SWIGLU if gated else "gelu",
        qkv_bias=f"{block}.attn.qkv.bias" in shapes,
        key_bias=not (rotary and f"{block}.attn.qkv.bias" in shapes),
        norm_eps=1e-5 if rotary else 1e-6,
    )


def _original(
    names: Names, found_by: tuple[str, ...], *, class_position: bool = True, rotary: bool = False, crop: float = 1.0
) -> Format:
    def classes(shapes: Shapes, config: Mapping[str, Any]) -> int:
        return shapes["head.weight"][0] if "head.weight" in shapes else 0

    return Format(
        dialect="original",
        family=ViTConfig.family,
        recognises=lambda shapes, config: (
            "architecture" not in config  # timm's, which has models of the same names that compute something else
            and all(key in shapes for key in ("patch_embed.proj.weight", *found_by))
        ),
        row=lambda shapes, config: original_row(shapes, names),
        classes=classes,
        rules=lambda row, classes: original_rules(row, classes, names, class_position=class_position, rotary=rotary),
        stages=lambda row: [],
        write_config=lambda row, classes: {},
        ignored=("mask_token", "*.bias_mask", "rope_embed.*", "local_cls_norm.*"),
        preprocessing=PreprocessingConfig(crop=crop),
        meant=meant,
    )


# --- the authors of ViT: .npz ----------------------------------------------------------------------------------------
#
# flax's GELU, which their code calls, is the tanh form; timm and transformers compute these weights with the exact one,
# and so does this.

Read = Callable[[Tensor], Tensor]


def _changed(ours: str, theirs: str, read: Read, write: Read) -> Rule:
    return Rule(ours, (theirs,), read, lambda tensor: (write(tensor),))


def _flip(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)


def npz_rules(row: Row, classes: int) -> list[Rule]:
    """Kernels are (in, out); those of attention have heads as an axis of their own."""
    assert isinstance(row, ViTConfig)
    plain = TIMM_NAMES
    usual = row.pool == "token" and row.position == "learned" and row.mlp == "gelu" and row.qkv_bias and row.key_bias
    special = row.registers or row.layer_scale is not None or row.pre_norm or row.norm_pooled or row.projection
    if not usual or special:
        raise NoWords("the authors' ViT has no model of this form, only the plain one")
    row = replace(row, class_position=True)
    tokens = replace(plain, class_tokens=("cls",), positions="Transformer/posembed_input/pos_embedding", head=("head",))
    named = {rule.ours: rule for rule in vit_rules(replace(row, depth=0), 0, tokens)}
    rules = [named["backbone.class_token"], named["backbone.positions.table"]]
    rules += [
        _changed(
            "backbone.patches.projection.weight",
            "embedding/kernel",
            lambda kernel: kernel.permute(3, 2, 0, 1),
            lambda weight: weight.permute(2, 3, 1, 0),
        ),
        _changed("backbone.patches.projection.bias", "embedding/bias", _same, _same),
    ]
    for i in range(row.depth):
        rules += _npz_block(row, f"backbone.blocks.{i}", f"Transformer/encoderblock_{i}")
    rules += _npz_norm("backbone.norm", "Transformer/encoder_norm")
    return rules + (_npz_dense("head", "head") if classes else [])


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _npz_norm(ours: str, theirs: str) -> list[Rule]:
    return [
        _changed(f"{ours}.weight", f"{theirs}/scale", _same, _same),
        _changed(f"{ours}.bias", f"{theirs}/bias", _same, _same),
    ]


def _npz_dense(ours: str, theirs: str) -> list[Rule]:
    return [
        _changed(f"{ours}.weight", f"{theirs}/kernel", _flip, _flip),
        _changed(f"{ours}.bias", f"{theirs}/bias", _same, _same),
    ]


def _npz_block(row: ViTConfig, ours: str, theirs: str) -> list[Rule]:
    H, D = row.heads, row.dim // row.heads
    attention = f"{theirs}/MultiHeadDotProductAttention_1"
    parts = [f"{attention}/{name}" for name in ("query", "key", "value")]
    qkv = [
        Rule(
            f"{ours}.attention.qkv.weight",
            tuple(f"{part}/kernel" for part in parts),
            lambda *kernels: torch.cat([kernel.flatten(1).T for kernel in kernels]),  # each (C, H, D)
            lambda whole: tuple(part.T.unflatten(1, (H, D)) for part in whole.chunk(3)),
        ),
        Rule(
            f"{ours}.attention.qkv.bias",
            tuple(f"{part}/bias" for part in parts),
            lambda *biases: torch.cat([bias.flatten() for bias in biases]),
            lambda whole: tuple(part.unflatten(0, (H, D)) for part in whole.chunk(3)),
        ),
    ]
    out = [
        _changed(
            f"{ours}.attention.out.weight",
            f"{attention}/out/kernel",
            lambda kernel: kernel.flatten(0, 1).T,  # (H, D, C)
            lambda weight: weight.T.unflatten(0, (H, D)),
        ),
        _changed(f"{ours}.attention.out.bias", f"{attention}/out/bias", _same, _same),
    ]
    norms = _npz_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0") + _npz_norm(f"{ours}.norm2", f"{theirs}/LayerNorm_2")
    up = _npz_dense(f"{ours}.mlp.up", f"{theirs}/MlpBlock_3/Dense_0")
    return [*norms, *qkv, *out, *up, *_npz_dense(f"{ours}.mlp.down", f"{theirs}/MlpBlock_3/Dense_1")]


def npz_row(shapes: Shapes, config: Mapping[str, Any]) -> ViTConfig:
    patch_size, _, _, dim = shape_of(shapes, "embedding/kernel")
    block = "Transformer/encoderblock_"
    side, _ = grid_side(shape_of(shapes, "Transformer/posembed_input/pos_embedding")[1] - 1, 0)
    return ViTConfig(
        dim=dim,
        depth=len({name.removeprefix(block).split("/")[0] for name in shapes if name.startswith(block)}),
        heads=shape_of(shapes, f"{block}0/MultiHeadDotProductAttention_1/query/kernel")[1],
        hidden=shape_of(shapes, f"{block}0/MlpBlock_3/Dense_0/kernel")[1],
        patch_size=patch_size,
        image_size=side * patch_size,
    )


NPZ = Format(
    dialect="original",
    family=ViTConfig.family,
    recognises=lambda shapes, config: {"embedding/kernel", "Transformer/encoder_norm/scale"} <= shapes.keys(),
    row=npz_row,
    classes=lambda shapes, config: shapes["head/kernel"][1] if "head/kernel" in shapes else 0,
    rules=npz_rules,
    stages=lambda row: [],
    write_config=lambda row, classes: {},
    preprocessing=PreprocessingConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    meant=meant,
)
TORCHVISION, TORCHVISION_1 = _torchvision(TORCHVISION_NAMES), _torchvision(TORCHVISION_1_NAMES)
DINOV2 = _original(DINOV2_NAMES, ("mask_token", "pos_embed", "blocks.0.ls1.gamma"), crop=0.875)
DINOV2_QUARTERS = _original(DINOV2_QUARTERS_NAMES, ("pos_embed", "blocks.0.0.ls1.gamma"), crop=0.875)
DEIT3 = _original(DEIT3_NAMES, ("pos_embed", "blocks.0.gamma_1"), class_position=False)
DINOV3 = _original(DINOV3_NAMES, ("storage_tokens", "blocks.0.ls1.gamma"), rotary=True)

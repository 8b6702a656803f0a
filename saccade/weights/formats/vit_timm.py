"""The ViT family as timm names it: its VisionTransformer, the distilled one, and Eva where positions are rotary."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.vit import VIT, ViTConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.layers.feedforward import SWIGLU
from saccade.weights.formats.reference import as_described, exact
from saccade.weights.formats.table import Format, NoWords, Peer, Rule, Shapes, Stage
from saccade.weights.formats.vit_names import (
    Names,
    depth_of,
    extra_rows,
    grid_side,
    likely_heads,
    meant,
    shape_of,
    vit_rules,
    vit_stages,
)

PLAIN = Names(
    patches="patch_embed.proj",
    class_tokens=("cls_token", "dist_token"),
    registers="reg_token",
    positions="pos_embed",
    block="blocks.{i}",
    norms=("norm1.*", "norm2.*"),
    qkv=("attn.qkv.*",),
    out="attn.proj.*",
    mlp=("mlp.fc1.*", "mlp.fc2.*"),
    gate_up=("mlp.fc1.*",),
    gate_down="mlp.fc2.*",
    scales=("ls1.gamma", "ls2.gamma"),
    norm="norm",
    head=("head", "head_dist"),
    pre_norm="norm_pre",
    pooled_norm="fc_norm",
    pooling="attn_pool",
    pooling_query="latent",
    pooling_qkv=("q.*", "kv.*"),
    pooling_rest=("proj.*", "norm.*", "mlp.fc1.*", "mlp.fc2.*"),
    register_positions=True,
)
EVA = replace(
    PLAIN,
    biases=("attn.q_*", "attn.v_*"),
    gate_up=("mlp.fc1_g.*", "mlp.fc1_x.*"),
    scales=("gamma_1", "gamma_2"),
)
POOLS = {"token": "token", "distilled": "token", "mean": "avg", "attention": "map"}
OUR_POOLS = {"token": "token", "avg": "mean", "map": "attention"}
OUR_MLPS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "gelu_erf": "gelu"}


# --- what the name of an architecture says that shapes do not --------------------------------------------------------


@dataclass(frozen=True)
class Trait:
    """Holds for architectures whose name matches."""

    pattern: str
    values: Mapping[str, Any]


TRAITS = (
    Trait(r"_clip_|_dinov3|^beit3|^eva_", {"norm_eps": 1e-5}),
    Trait(r"quickgelu", {"mlp": "quick_gelu"}),
    Trait(
        r"(so400m|giantopt)_patch16_siglip|base_patch32_siglip|large_patch16_siglip_(gap_)?512", {"mlp": "gelu_tanh"}
    ),
    Trait(r"giantopt|base_patch16_gap_224", {"heads": 16}),
)
# of the same names of tensors, but with blocks that compute something else
OTHERS = r"_rope_|_pe_|_rpn_|_xp_|_dwee_|_dlittle_|_radio_|naflex|^beit3|^eva|^test_vit3"


def names_of(row: ViTConfig) -> Names:
    return EVA if row.position == "rotary" else PLAIN


def timm_rules(row: Row, classes: int) -> list[Rule]:
    assert isinstance(row, ViTConfig)
    _pool_of(row)
    if row.position not in ("learned", "rotary"):
        raise NoWords(f"timm has no ViT with {row.position} positions")
    if row.position == "rotary" and row.qkv_bias and row.key_bias:
        raise NoWords("timm has no ViT with rotary positions and a bias of keys")
    if not row.projection:
        return vit_rules(row, classes, names_of(row))
    if classes:
        raise NoWords("timm keeps the projection of CLIP where a classifier would be: write it without the head")
    return [*vit_rules(replace(row, projection=None), 0, names_of(row)), _PROJECTION]


def _pool_of(row: ViTConfig) -> str:
    if row.pool not in POOLS:
        raise NoWords(f"timm has no model that pools by {row.pool}")
    return POOLS[row.pool]


_PROJECTION = Rule(
    "backbone.projection.weight",
    ("head.weight", "head.bias"),
    lambda weight, bias: weight,
    lambda weight: (weight, weight.new_zeros(len(weight))),
)


def timm_stages(row: Row) -> list[Stage]:
    assert isinstance(row, ViTConfig)
    return vit_stages(row, names_of(row))


# --- reading ---------------------------------------------------------------------------------------------------------


def is_timm(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    keys = shapes.keys()
    if not {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight"} <= keys:
        return False
    if len(shapes["patch_embed.proj.weight"]) != 4 or {"mask_token", "storage_tokens"} & keys:
        return False
    if "blocks.0.gamma_1" in keys and "pos_embed" in keys:
        return False  # the authors' DeiT III
    stated = str(config.get("architecture", ""))
    if "pos_embed" not in keys and "cls_token" not in keys and "dinov3" not in stated:
        return False  # rotary positions of another kind
    if {"attn_pool.latent", "norm_pre.weight"} <= keys and not stated:
        return False  # a Perception Encoder, with rotary positions that are no tensor
    return re.search(OTHERS, stated) is None


def timm_row(shapes: Shapes, config: Mapping[str, Any]) -> ViTConfig:
    """Without a `config.json`: heads 64 wide (but for sizes known to differ), exact GELU, and the pooling that the
    tensors suggest, which for rotary positions is the mean, timm's default."""
    arguments = {**config, **(config.get("model_args") or {})}
    dim, _, patch_size, other = shape_of(shapes, "patch_embed.proj.weight")
    if patch_size != other:
        raise UserError(f"patches of {patch_size}x{other} pixels are not square; such a model cannot be read")
    rotary = "pos_embed" not in shapes
    swiglu = "blocks.0.mlp.fc1_g.weight" in shapes
    down = shape_of(shapes, "blocks.0.mlp.fc2.weight")[1]
    packed_swiglu = not swiglu and shape_of(shapes, "blocks.0.mlp.fc1.weight")[0] == 2 * down
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    pool = _pool(shapes, arguments, rotary)
    has_class = "cls_token" in shapes
    image_size = _image_size(arguments, 256 if rotary else 224)
    class_position = True
    if not rotary:
        prefix = int(has_class) + int("dist_token" in shapes) + registers
        side, class_position = grid_side(shapes["pos_embed"][1], prefix)
        image_size = side * patch_size
    qkv_bias = "blocks.0.attn.qkv.bias" in shapes or "blocks.0.attn.q_bias" in shapes
    row = ViTConfig(
        dim=dim,
        depth=depth_of(shapes, "blocks."),
        heads=likely_heads(dim, rotary=rotary),
        hidden=down,
        patch_size=patch_size,
        image_size=image_size,
        pool=pool,
        class_token=has_class and pool not in ("token", "distilled"),
        norm_pooled="fc_norm.weight" in shapes,
        position="rotary" if rotary else "learned",
        class_position=class_position or not (has_class or registers),
        registers=registers,
        layer_scale=_layer_scale(shapes, rotary),
        mlp=SWIGLU if swiglu or packed_swiglu else "gelu",
        qkv_bias=qkv_bias,
        key_bias=not (rotary and qkv_bias),
        pre_norm="norm_pre.weight" in shapes,
        norm_eps=1e-5 if rotary else 1e-6,
    )
    return _with_traits(row, arguments)


def _pool(shapes: Shapes, arguments: Mapping[str, Any], rotary: bool) -> str:
    if "dist_token" in shapes:
        return "distilled"
    if "attn_pool.latent" in shapes:
        return "attention"
    if "cls_token" not in shapes or "fc_norm.weight" in shapes:
        return "mean"
    named = arguments.get("global_pool")
    if named is None:
        return "mean" if rotary else "token"
    if named not in OUR_POOLS:
        raise UserError(f"pools by {named!r}, which no model here does")
    return OUR_POOLS[named]


def _layer_scale(shapes: Shapes, rotary: bool) -> float | None:
    return 1e-5 if f"blocks.0.{'gamma_1' if rotary else 'ls1.gamma'}" in shapes else None


def _image_size(arguments: Mapping[str, Any], default: int) -> int:
    size = arguments.get("img_size") or arguments.get("pretrained_cfg", {}).get("input_size", (3, default, default))[-1]
    return int(size[-1] if isinstance(size, list | tuple) else size)


def _with_traits(row: ViTConfig, arguments: Mapping[str, Any]) -> ViTConfig:
    name = str(arguments.get("architecture", ""))
    for trait in TRAITS:
        if re.search(trait.pattern, name):
            values = dict(trait.values)
            if row.mlp == SWIGLU:
                values.pop("mlp", None)
            row = replace(row, **values)
    if "num_heads" in arguments:
        row = replace(row, heads=int(arguments["num_heads"]))
    act = arguments.get("act_layer")
    if act is not None and row.mlp != SWIGLU:
        if act not in OUR_MLPS:
            raise UserError(f"config.json: act_layer {act!r} is in no ViT here, only {', '.join(OUR_MLPS)}")
        row = replace(row, mlp=OUR_MLPS[act])
    return row


def timm_classes(shapes: Shapes, config: Mapping[str, Any]) -> int:
    return shapes["head.weight"][0] if "head.weight" in shapes else 0


# --- writing and building --------------------------------------------------------------------------------------------


def _arguments(row: ViTConfig) -> dict[str, Any]:
    """What timm's class is called with; all of it can be written as JSON."""
    arguments: dict[str, Any] = {
        "img_size": row.side * row.patch_size if row.position == "learned" else row.image_size,
        "patch_size": row.patch_size,
        "embed_dim": row.dim,
        "depth": row.depth,
        "num_heads": row.heads,
        "mlp_ratio": (row.hidden + 0.5) / row.dim,  # they round the product down
        "global_pool": _pool_of(row),
        "qkv_bias": row.qkv_bias,
        "init_values": row.layer_scale,
        "class_token": row.class_tokens > 0,
    }
    if row.position == "rotary":
        return {
            **arguments,
            "swiglu_mlp": row.mlp == SWIGLU,
            "swiglu_align_to": 1,
            "num_reg_tokens": row.registers,
            "use_fc_norm": row.norm_pooled,
        }
    if row.mlp == SWIGLU:
        arguments["mlp_ratio"] = (2 * row.hidden + 0.5) / row.dim
    else:
        arguments["act_layer"] = row.mlp
    return {
        **arguments,
        "fc_norm": row.norm_pooled,
        "pre_norm": row.pre_norm,
        "reg_tokens": row.registers,
        "no_embed_class": extra_rows(row, PLAIN) == 0,
    }


def _architecture(row: ViTConfig) -> str:
    """timm's name for a size of the table; for others the one from which the arguments lead to the row."""
    if row.position == "rotary":
        biased = "_qkvb" if row.qkv_bias else ""
        return f"vit_small_patch16_dinov3{biased}"
    if row.pool == "distilled":
        return "deit_base_distilled_patch16_224"
    if row.mlp == SWIGLU:
        return "vit_giant_patch14_dinov2"
    return "vit_base_patch16_clip_224" if row.norm_eps == 1e-5 else "vit_base_patch16_224"


KNOWN = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
    "vit_giant": "vit_giant_patch14_224",
    "vit_small_8": "vit_small_patch8_224",
    "vit_base_8": "vit_base_patch8_224",
    "vit_small_32": "vit_small_patch32_224",
    "vit_base_32": "vit_base_patch32_224",
    "vit_large_32": "vit_large_patch32_224",
    **{f"deit_{size}": f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")},
    **{f"deit3_{size}": f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")},
    "deit3_huge": "deit3_huge_patch14_224",
    **{f"dinov2_{size}": f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")},
    **{f"dinov2_{size}_registers": f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large", "giant")},
    **{
        f"dinov3_{size}": f"vit_{size}_patch16_dinov3_qkvb"
        for size in ("small", "small_plus", "base", "large", "huge_plus")
    },
    "dinov3_7b": "vit_7b_patch16_dinov3",
}


def timm_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, ViTConfig)
    usual = (1e-5,) if row.position == "rotary" else (1e-6,)
    if row.position != "rotary" and row.pool != "distilled" and row.mlp != SWIGLU:
        usual = (1e-6, 1e-5)
    if row.norm_eps not in usual:
        if row.norm_eps > usual[0]:
            raise NoWords(f"timm has no such ViT whose norms have eps {row.norm_eps:g}, only {usual[0]:g}")
        row = replace(row, norm_eps=usual[0])  # HF's 1e-12 and timm's 1e-6 are one in practice
    known = next((name for name in KNOWN if VIT[name].is_like(row) and VIT[name].norm_eps == row.norm_eps), None)
    outputs = row.projection or classes
    return {
        "architecture": KNOWN[known] if known else _architecture(row),
        "num_classes": outputs,
        "num_features": row.dim,
        "global_pool": _pool_of(row),
        "model_args": _arguments(row),
        "pretrained_cfg": {"input_size": [3, row.image_size, row.image_size], "num_classes": outputs},
    }


def build_timm(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    from timm.layers.mlp import SwiGLUPacked
    from timm.layers.norm import LayerNorm
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    assert isinstance(row, ViTConfig)
    norm = partial(LayerNorm, eps=row.norm_eps)
    outputs = row.projection or classes
    if (described := as_described(config, outputs, {"dynamic_img_size": True})) is not None:
        return described
    arguments = {**_arguments(row), "norm_layer": norm, "num_classes": outputs, "dynamic_img_size": True}
    if row.position == "rotary":
        rotary = {
            "use_rot_pos_emb": True,
            "use_abs_pos_emb": False,
            "rope_type": "dinov3",
            "rope_temperature": 100,
            "rope_rotate_half": True,
        }
        return Eva(**arguments, **rotary)
    if row.mlp == SWIGLU:
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if row.pool == "distilled":
        return VisionTransformerDistilled(**arguments)
    return VisionTransformer(**arguments)


def timm_logits(model: Any, images: Tensor) -> Tensor:
    """The distilled model without classes gives the mean of both tokens; here they stand side by side, as in ours."""
    with exact(images):
        if images.dtype == torch.float64 and getattr(model, "rope", None) is not None:
            model.rope.reset_parameters()  # the frequencies again, in float64
        if getattr(model, "dist_token", None) is not None and model.num_classes == 0:
            return model.forward_features(images)[:, :2].flatten(1)
        return model(images)


TIMM = Format(
    dialect="timm",
    family=ViTConfig.family,
    recognises=is_timm,
    row=timm_row,
    classes=timm_classes,
    rules=timm_rules,
    stages=timm_stages,
    write_config=timm_config,
    ignored=("rope.*", "*.attn.k_bias"),
    peer=Peer("timm", build_timm, timm_logits),
    preprocessing=PreprocessingConfig(crop=0.875),  # of DeiT and DINO, whose files come bare
    meant=meant,
)

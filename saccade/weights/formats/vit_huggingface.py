"""The ViT family as Hugging Face names it in files: ViT, DeiT, Dinov2 (with registers), DINOv3ViT, SigLIP and CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.vit import ViTConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.layers.feedforward import SWIGLU
from saccade.weights.formats.reference import FileNamed, stated, transformers_places
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

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_DINOV2 = Names(
    patches="embeddings.patch_embeddings.projection",
    class_tokens=("embeddings.cls_token", "embeddings.distillation_token"),
    registers="embeddings.register_tokens",
    positions="embeddings.position_embeddings",
    block="encoder.layer.{i}",
    norms=("norm1.*", "norm2.*"),
    qkv=tuple(f"attention.attention.{name}.*" for name in ("query", "key", "value")),
    out="attention.output.dense.*",
    mlp=("mlp.fc1.*", "mlp.fc2.*"),
    gate_up=("mlp.weights_in.*",),
    gate_down="mlp.weights_out.*",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    norm="layernorm",
    head=("classifier",),
)
_VIT = replace(
    _DINOV2,
    norms=("layernorm_before.*", "layernorm_after.*"),
    mlp=("intermediate.dense.*", "output.dense.*"),
    gate_up=(),
    scales=("", ""),
)
_DEIT = replace(
    _VIT,
    registers="embeddings.distillation_token",  # where the head looks at the class token alone
    register_positions=True,
    head=("cls_classifier", "distillation_classifier"),
)
_DINOV3 = replace(
    _DINOV2,
    patches="embeddings.patch_embeddings",
    block="layer.{i}",
    qkv=tuple(f"attention.{name}_proj.*" for name in "qkv"),
    out="attention.o_proj.*",
    mlp=("mlp.up_proj.*", "mlp.down_proj.*"),
    gate_up=("mlp.gate_proj.*", "mlp.up_proj.*"),
    gate_down="mlp.down_proj.*",
    norm="norm",
)
_CLIP = Names(
    patches="embeddings.patch_embedding",
    class_tokens=("embeddings.class_embedding",),
    registers="",
    positions="embeddings.position_embedding.weight",
    block="encoder.layers.{i}",
    norms=("layer_norm1.*", "layer_norm2.*"),
    qkv=tuple(f"self_attn.{name}_proj.*" for name in "qkv"),
    out="self_attn.out_proj.*",
    mlp=("mlp.fc1.*", "mlp.fc2.*"),
    gate_up=(),
    gate_down="",
    scales=("", ""),
    norm="post_layernorm",
    head=("classifier",),
    pre_norm="pre_layrnorm",
    projection="visual_projection.weight",
    pooling="head",
    pooling_query="probe",
    pooling_qkv=("attention.in_proj_*",),
    pooling_rest=("attention.out_proj.*", "layernorm.*", "mlp.fc1.*", "mlp.fc2.*"),
    flat=True,
)


@dataclass(frozen=True)
class Kind:
    """A model type of transformers."""

    types: tuple[str, ...]  # `model_type` of its own config.json, then of those that hold it
    names: Names
    prefix: str  # before the names, where the file also holds something else
    always: bool  # the prefix is there without anything else, too
    eps: float
    mlp: str
    resize: str
    found_by: tuple[str, ...]  # keys that every file has (behind the prefix) ...
    unless: tuple[str, ...] = ()  # ... and keys that none has


_PATCHES = "embeddings.patch_embeddings.projection.weight"
_BEIT = ("encoder.layer.0.lambda_1", "embeddings.relative_position_bias")
_V2 = (_PATCHES, "embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.norm1.weight")
_V1 = (_PATCHES, "embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight")
_PLAIN = "encoder.layer.0.layernorm_before.weight"

KINDS = {
    "deit": Kind(
        ("deit",), _DEIT, "deit.", False, 1e-12, "gelu", "bicubic", (*_V1, _PLAIN, "embeddings.distillation_token")
    ),
    "vit": Kind(
        ("vit",),
        _VIT,
        "vit.",
        False,
        1e-12,
        "gelu",
        "bicubic",
        (*_V1, _PLAIN),
        ("embeddings.distillation_token", *_BEIT),
    ),
    "dinov2_with_registers": Kind(
        ("dinov2_with_registers",),
        _DINOV2,
        "dinov2_with_registers.",
        False,
        1e-6,
        "gelu",
        "antialias",
        (*_V2, "embeddings.register_tokens"),
    ),
    "dinov2": Kind(
        ("dinov2",), _DINOV2, "dinov2.", False, 1e-6, "gelu", "bicubic", _V2, ("embeddings.register_tokens",)
    ),
    "dinov3_vit": Kind(
        ("dinov3_vit",),
        _DINOV3,
        "",
        True,
        1e-5,
        "gelu",
        "antialias",
        ("embeddings.patch_embeddings.weight", "embeddings.cls_token", "layer.0.attention.q_proj.weight"),
    ),
    "clip_vision_model": Kind(
        ("clip_vision_model", "clip"),
        _CLIP,
        "vision_model.",
        True,
        1e-5,
        "quick_gelu",
        "bicubic",
        ("embeddings.patch_embedding.weight", "embeddings.class_embedding", "pre_layrnorm.weight"),
    ),
    "siglip_vision_model": Kind(
        ("siglip_vision_model", "siglip", "siglip2_vision_model", "siglip2"),
        _CLIP,
        "vision_model.",
        True,
        1e-6,
        "gelu_tanh",
        "bicubic",
        ("embeddings.patch_embedding.weight", "head.probe", "encoder.layers.0.layer_norm1.weight"),
    ),
}
OUR_MLPS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
THEIR_MLPS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def kind_of(row: ViTConfig) -> str:
    """The model type that a row can be written as."""
    if row.norm_pooled or row.mlp not in (*THEIR_MLPS, SWIGLU) or row.pool in ("mean", "sequence"):
        raise NoWords(f"transformers has no ViT that pools by {row.pool} like this one")
    if row.pool == "attention":
        kind, fits = "siglip_vision_model", row.class_tokens == 0 and row.registers == 0
    elif row.pre_norm:
        kind, fits = "clip_vision_model", row.pool == "token" and row.registers == 0
    elif row.position == "rotary":
        kind, fits = "dinov3_vit", row.pool == "token" and row.layer_scale is not None and row.registers > 0
    elif row.layer_scale is not None:
        kind = "dinov2_with_registers" if row.registers else "dinov2"
        fits = row.pool in ("token", "token_mean")
    else:
        distilled = row.pool == "distilled" or (row.pool == "token" and row.registers == 1)
        kind, fits = "deit" if distilled else "vit", distilled or (row.pool == "token" and row.registers == 0)
    special = {"attention": row.pool == "attention", "pre_norm": row.pre_norm, "projection": row.projection}
    alone = sum(1 for value in special.values() if value) - bool(row.pre_norm and row.projection) <= 1
    learned = row.position == ("rotary" if kind == "dinov3_vit" else "learned")
    gated = row.mlp != SWIGLU or kind.startswith("dino")
    if not (fits and alone and learned and gated):
        raise NoWords(f"transformers has no model of this form ({row.about}, {row.pool}, {row.position}, {row.mlp})")
    return kind


def _prefix(kind: str, classes: int, *, flipped: bool = False) -> str:
    """Before every name but those of heads. `flipped` is the other way round from how transformers writes it."""
    there = KINDS[kind].always or classes > 0
    return KINDS[kind].prefix if there != flipped else ""


def names_of(row: ViTConfig, classes: int, *, flipped: bool = False) -> Names:
    kind = kind_of(row)
    names = replace(KINDS[kind].names, prefix=_prefix(kind, classes, flipped=flipped))
    return replace(names, head=("classifier",)) if row.pool == "token" else names


def huggingface_rules(row: Row, classes: int, *, flipped: bool = False) -> list[Rule]:
    assert isinstance(row, ViTConfig)
    # in their files tokens always have places of their own
    row = replace(row, class_position=True)
    kind = kind_of(row)
    if classes and kind in ("dinov3_vit", "clip_vision_model", "siglip_vision_model"):
        raise NoWords(f"transformers has no classifier on the summary of {kind}; it is read and written without")
    rules = vit_rules(row, classes, names_of(row, classes, flipped=flipped))
    if classes and row.pool == "token" and kind.startswith("dinov2"):
        rules = [_of_token_alone(rule) if rule.ours == "head.weight" else rule for rule in rules]
    return rules


def _of_token_alone(rule: Rule) -> Rule:
    """Their classifier of DINOv2 also sees the mean of the patches; here with weights of zero."""

    def read(both: Tensor) -> Tensor:
        of_token, of_mean = both.chunk(2, dim=1)
        if of_mean.any():
            raise ValueError("the classifier looks at the mean of the patches, too, which this form does not have")
        return of_token

    return Rule(
        rule.ours,
        rule.theirs,
        read,
        lambda weight: (torch.cat((weight, torch.zeros_like(weight)), dim=1),),
        gradient=lambda both: both.chunk(2, dim=1)[0],
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def find_kind(shapes: Shapes) -> tuple[str, str] | None:
    """Model type and prefix, by keys."""
    for name, kind in KINDS.items():
        for prefix in dict.fromkeys((kind.prefix, "")):
            if all(prefix + key in shapes for key in kind.found_by):
                return None if any(prefix + key in shapes for key in kind.unless) else (name, prefix)
    return None


def recognises(shapes: Shapes, config: Mapping[str, Any], *, flipped: bool = False) -> bool:
    found = find_kind(shapes)
    if found is None:
        return False
    kind, prefix = found
    stated = config.get("model_type", kind)
    as_written = prefix == _prefix(kind, huggingface_classes(shapes, config))
    return stated in KINDS[kind].types and as_written != flipped


def huggingface_classes(shapes: Shapes, config: Mapping[str, Any]) -> int:
    for name in ("classifier.weight", "cls_classifier.weight"):
        if name in shapes:
            return shapes[name][0]
    return 0


def huggingface_row(shapes: Shapes, config: Mapping[str, Any]) -> ViTConfig:
    """Without a `config.json`: heads 64 wide (but for sizes known to differ) and the model type's usual settings."""
    found = find_kind(shapes)
    assert found is not None
    name, p = found
    kind = KINDS[name]
    # a part of a larger config that says nothing has the defaults of its class, which are those of base
    values = {**({"num_attention_heads": 12} if config else {}), **config.get("vision_config", config)}
    names = replace(kind.names, prefix="")

    def shape(key: str) -> tuple[int, ...]:
        return shape_of(shapes, p + key)

    dim, _, patch_size, other = shape(f"{names.patches}.weight")
    if patch_size != other:
        raise UserError(f"patches of {patch_size}x{other} pixels are not square; such a model cannot be read")
    block = names.block.format(i=0)
    registers = shape("embeddings.register_tokens")[1] if p + "embeddings.register_tokens" in shapes else 0
    classes = huggingface_classes(shapes, config)
    distilled = name == "deit"
    pool = {"siglip_vision_model": "attention", "deit": "distilled"}.get(name, "token")
    if distilled and "classifier.weight" in shapes:
        pool, registers = "token", 1
    if classes and name.startswith("dinov2"):
        pool = "token_mean"
    image_size = values.get("image_size", 224)
    if name != "dinov3_vit":
        tokens = {"siglip_vision_model": 0, "deit": 2}.get(name, 1)
        table = shape(names.positions)
        image_size = grid_side(table[-2] - tokens, 0)[0] * patch_size
    gated = f"{p}{block}.mlp.weights_out.weight" in shapes or f"{p}{block}.mlp.gate_proj.weight" in shapes
    down = names.gate_down if gated else names.mlp[1]
    bias = [f"{p}{block}.{name}".replace("*", "bias") in shapes for name in (names.qkv[0], names.qkv[1])]
    if float(values.get("rope_theta", 100.0)) != 100.0:
        raise UserError(f"config.json: rope_theta {values['rope_theta']} is in no model here, only 100")
    act = values.get("hidden_act")
    if act is not None and act not in OUR_MLPS and not gated:
        raise UserError(f"config.json: hidden_act {act!r} is in no model here")
    return ViTConfig(
        dim=dim,
        depth=depth_of(shapes, p + names.block.format(i="")),
        heads=values.get("num_attention_heads") or likely_heads(dim, rotary=name == "dinov3_vit"),
        hidden=shape(f"{block}.{down}".replace("*", "weight"))[1],
        patch_size=patch_size,
        image_size=image_size if isinstance(image_size, int) else image_size[-1],
        pool=pool,
        projection=shapes["visual_projection.weight"][0] if "visual_projection.weight" in shapes else None,
        position="rotary" if name == "dinov3_vit" else "learned",
        resize=kind.resize,
        registers=registers,
        layer_scale=float(values.get("layerscale_value", 1.0)) if name.startswith("dino") else None,
        mlp=SWIGLU if gated else OUR_MLPS.get(str(act), kind.mlp),  # pyright: ignore[reportArgumentType]
        qkv_bias=bias[0],
        key_bias=bias[1] or not bias[0],
        pre_norm=name == "clip_vision_model",
        norm_eps=float(values.get("layer_norm_eps", kind.eps)),
    )


# --- writing and building --------------------------------------------------------------------------------------------

MODELS = {  # without and with classes
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassificationWithTeacher"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", ""),
    "clip_vision_model": ("CLIPVisionModel", ""),
    "siglip_vision_model": ("SiglipVisionModel", ""),
}


def _model(row: ViTConfig, classes: int) -> str:
    kind = kind_of(row)
    if row.projection:
        return "CLIPVisionModelWithProjection"
    if classes and kind == "deit" and row.pool == "token":
        return "DeiTForImageClassification"
    return MODELS[kind][classes > 0]


def huggingface_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, ViTConfig)
    kind = kind_of(row)
    values: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_model(row, classes)],
        "hidden_size": row.dim,
        "num_hidden_layers": row.depth,
        "num_attention_heads": row.heads,
        "patch_size": row.patch_size,
        "image_size": row.image_size if kind == "dinov3_vit" else row.side * row.patch_size,
        "layer_norm_eps": row.norm_eps,
        "hidden_act": THEIR_MLPS.get(row.mlp, "silu" if kind == "dinov3_vit" else "gelu"),
    }
    if kind.startswith("dinov2"):
        values |= {"mlp_ratio": _mlp_ratio(row), "use_swiglu_ffn": row.mlp == SWIGLU}
    else:
        values["intermediate_size"] = row.hidden
    if kind == "dinov3_vit":
        values |= {"use_gated_mlp": row.mlp == SWIGLU, "key_bias": row.qkv_bias and row.key_bias}
        values |= {"query_bias": row.qkv_bias, "value_bias": row.qkv_bias}
    elif not kind.endswith("vision_model"):
        values["qkv_bias"] = row.qkv_bias
    if kind.startswith("dino"):
        values["layerscale_value"] = row.layer_scale
    if kind in ("dinov3_vit", "dinov2_with_registers"):
        values["num_register_tokens"] = row.registers
    if row.projection:
        values["projection_dim"] = row.projection
    return values


def _mlp_ratio(row: ViTConfig) -> int:
    """They keep whole numbers; of SwiGLU's width two thirds of the product, up to a multiple of 8."""
    for ratio in range(1, 17):
        width = ratio * row.dim
        if row.hidden == ((int(width * 2 / 3) + 7) // 8 * 8 if row.mlp == SWIGLU else width):
            return ratio
    raise NoWords(f"transformers has no DINOv2 with a feed-forward width of {row.hidden} for {row.dim} channels")


def build_huggingface(row: Row, classes: int, config: Mapping[str, Any], *, flipped: bool = False) -> nn.Module:
    import transformers

    assert isinstance(row, ViTConfig)
    kind, architecture = kind_of(row), _model(row, classes)
    model_class = getattr(transformers, architecture)
    values = stated(config, huggingface_config(row, classes))
    values |= {"num_labels": classes} if classes else {}
    values |= {"projection_dim": row.projection} if row.projection else {}
    settings = model_class.config_class.from_dict(values)
    bare = {"add_pooling_layer": False} if architecture in ("ViTModel", "DeiTModel") else {}
    inner = model_class(settings, **bare)
    prefix = _prefix(kind, classes, flipped=flipped)
    own = prefix if architecture.startswith(MODELS[kind][0]) and not row.projection else ""
    return FileNamed(inner, transformers_places(inner, own), _answer(row, classes, kind), _parts(row, inner))


def _parts(row: ViTConfig, model: Any) -> dict[str, nn.Module]:
    """What stages look at, by its path in files; in memory the path depends on the version and on the head."""
    names = KINDS[kind_of(row)].names
    trunk = next((getattr(model, name) for name in TRUNKS if hasattr(model, name)), model)
    blocks = next(found for path in BLOCKS if (found := _find(trunk, path)) is not None)
    parts = {path: trunk.get_submodule(path) for path in (names.patches, names.pre_norm) if path and _find(trunk, path)}
    return {**parts, **{names.block.format(i=i): block for i, block in enumerate(blocks)}}


TRUNKS = ("vit", "deit", "dinov2", "dinov2_with_registers", "vision_model")
BLOCKS = ("layers", "encoder.layer", "encoder.layers", "model.layer", "layer")


def _find(module: nn.Module, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _answer(row: ViTConfig, classes: int, kind: str) -> Callable[[Any, Tensor], Tensor]:
    """How a model of transformers is called for logits or the summary."""
    any_size = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}

    def answer(model: Any, images: Tensor) -> Tensor:
        if kind == "dinov3_vit" and images.dtype == torch.float64:
            return _exact_rotary(model, images)
        outputs = model(images, **any_size)
        if classes:
            return outputs.logits
        if row.projection:
            return outputs.image_embeds
        if kind in ("siglip_vision_model", "clip_vision_model"):
            return outputs.pooler_output
        tokens = outputs.last_hidden_state
        if row.pool == "token_mean":
            return torch.cat((tokens[:, 0], tokens[:, row.prefix :].mean(dim=1)), dim=1)
        return tokens[:, : row.class_tokens].flatten(1)

    return answer


def _exact_rotary(model: Any, images: Tensor) -> Tensor:
    """Frequencies and places anew in float64: they keep them in float32, the latter in a cache."""
    from transformers.models.dinov3_vit import modeling_dinov3_vit as theirs

    places = theirs.get_patches_center_coordinates
    rope = model.rope_embeddings
    rates = torch.arange(0, 1, 4 / rope.head_dim, dtype=torch.float64)
    rope.inv_freq.copy_(1 / rope.base**rates)
    with patch.object(theirs, "get_patches_center_coordinates", getattr(places, "__wrapped__", places)):
        return model(images).last_hidden_state[:, 0]


def huggingface_stages(row: Row) -> list[Stage]:
    assert isinstance(row, ViTConfig)
    return vit_stages(row, KINDS[kind_of(row)].names)


IGNORED = (
    "*mask_token",
    "pooler.*",
    "*embeddings.position_ids",
    "*rope_embeddings.*",
    "text_model.*",
    "text_projection.weight",
    "logit_scale",
    "logit_bias",
)


def usual_preprocessing(row: Row) -> PreprocessingConfig:
    """Of the model type's published weights."""
    assert isinstance(row, ViTConfig)
    try:
        kind = kind_of(row)
    except NoWords:
        return PreprocessingConfig()
    half, cropped = {"mean": HALF, "std": HALF}, {"crop": 0.875}
    usual: dict[str, dict[str, Any]] = {
        "vit": {**half, "interpolation": "bilinear"},
        "deit": cropped,
        "dinov2": cropped,
        "dinov2_with_registers": cropped,
        "dinov3_vit": {"interpolation": "bilinear"},
        "clip_vision_model": {"mean": CLIP_MEAN, "std": CLIP_STD},
        "siglip_vision_model": half,
    }
    return PreprocessingConfig.model_validate(usual[kind])


def _format(*, flipped: bool) -> Format:
    return Format(
        dialect="huggingface",
        family=ViTConfig.family,
        recognises=lambda shapes, config: recognises(shapes, config, flipped=flipped),
        row=huggingface_row,
        classes=huggingface_classes,
        rules=lambda row, classes: huggingface_rules(row, classes, flipped=flipped),
        stages=huggingface_stages,
        write_config=huggingface_config,
        ignored=IGNORED,
        peer=Peer(
            "transformers",
            lambda row, classes, config: build_huggingface(row, classes, config, flipped=flipped),
            lambda model, images: model(images),
        ),
        preprocessing=usual_preprocessing,
        meant=meant,
    )


# as transformers writes them; and with the prefix where it writes none, or without it
HUGGINGFACE, HUGGINGFACE_OTHERWISE = _format(flipped=False), _format(flipped=True)

"""Swin of both versions as timm, Hugging Face, torchvision and the authors' repository name it.

All agree on sizes that windows divide; beyond, a row says whose way it is (`SwinConfig.pad_first`, `unshifted`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.backbones.swin import SWIN, SwinConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.weights.formats.reference import as_described, stated
from saccade.weights.formats.swin_names import (
    HUGGINGFACE,
    IGNORED,
    ORIGINAL,
    TIMM,
    TORCHVISION,
    Names,
    at,
    swin_rules,
    swin_stages,
)
from saccade.weights.formats.table import Format, NoWords, Peer, Shapes, State

# --- what shapes and descriptions tell -------------------------------------------------------------------------------


def _recognises(shapes: Shapes, names: Names) -> bool:
    """A block with one of the two kinds of position bias, and a merging where this dialect has it."""
    block, last = at(names.block, 0), at(names.merge, 0)
    known = f"{block}.{names.table}" in shapes or f"{block}.{names.logit_scale}" in shapes
    return known and f"{last}.reduction.weight" in shapes and len(shapes.get(f"{names.patches}.weight", ())) == 4


def _bare(shapes: Shapes, names: Names) -> dict[str, tuple[int, ...]]:
    """Without the prefix that the backbone has within a classifier."""
    bare = {}
    for name, shape in shapes.items():
        for prefix in filter(None, names.prefix):
            name = name.removeprefix(prefix)
        bare[name] = shape
    return bare


def _classes(shapes: Shapes, names: Names) -> int:
    return shapes.get(f"{names.head}.weight", (0,))[0]


def _form(shapes: Shapes, names: Names) -> SwinConfig:
    """All but the windows of version 2, which are left empty; the size of pictures is that which the windows fit."""
    bare = _bare(shapes, names)
    depths = []
    while f"{at(names.block, len(depths), 0)}.{names.norms[0]}.weight" in bare:
        block = 0
        while f"{at(names.block, len(depths), block)}.{names.norms[0]}.weight" in bare:
            block += 1
        depths.append(block)
    dim, _, height, width = bare[f"{names.patches}.weight"]
    if height != width:
        raise UserError(f"patches of {height}x{width} pixels are not supported, only squares")
    first = [at(names.block, s) for s in range(len(depths))]
    version = 2 if f"{first[0]}.{names.logit_scale}" in bare else 1
    key = names.logit_scale if version == 2 else names.table
    tables = [bare[f"{block}.{key}"] for block in first]
    return SwinConfig(
        version=version,
        dim=dim,
        depths=tuple(depths),
        heads=tuple(shape[0] if version == 2 else shape[1] for shape in tables),
        windows=tuple(_window(shape[0]) for shape in tables) if version == 1 else _told_windows(bare, first, names),
        patch_size=height,
        mlp_ratio=bare[f"{first[0]}.{names.mlp[0]}.weight"][0] / dim,
        drop_path=0.1,
    )


def _window(offsets: int) -> int:
    side = math.isqrt(offsets)
    if side * side != offsets or side % 2 == 0:
        raise UserError(f"a table of {offsets} position biases belongs to no square window, so it cannot be read")
    return (side + 1) // 2


def _told_windows(bare: Mapping[str, tuple[int, ...]], blocks: list[str], names: Names) -> tuple[int, ...]:
    """Of version 2, where the table of offsets was saved with the weights."""
    inside = names.logit_scale.removesuffix("logit_scale")
    tables = [bare.get(f"{block}.{inside}relative_coords_table", ()) for block in blocks]
    return tuple((table[1] + 1) // 2 for table in tables) if all(len(table) == 4 for table in tables) else ()


def _fitted(row: SwinConfig, window: int, image_size: int) -> SwinConfig:
    """With windows no larger than the map that a stage has of a picture of this size."""
    row = replace(row, image_size=image_size)
    return replace(row, windows=tuple(min(window, row.built_grid(s)) for s in range(len(row.depths))))


def _from_shapes(shapes: Shapes, names: Names, hint: str) -> SwinConfig:
    """For a bare file. The last stage has one window on pictures of the usual size."""
    row = _form(shapes, names)
    if not row.windows:
        raise UserError(
            "the weights of a Swin of the second version fit any window, so nothing here says which is meant: " + hint
        )
    return replace(row, image_size=row.stride * row.windows[-1])


HINT = "put the config.json of these weights beside them, or give --model"
LIKE_TIMM: dict[str, Any] = {"pad_first": False, "unshifted": "built"}
LIKE_SWINV2: dict[str, Any] = {"pad_first": True, "unshifted": "built"}  # of Hugging Face


def _meant(*ways: Mapping[str, Any]) -> Callable[[Row, Row, bool], Row]:
    """A row of the table, with the ways of a dialect, by version, with sizes that windows do not divide."""

    def meant(named: Row, read: Row, described: bool) -> Row:
        assert isinstance(named, SwinConfig)
        return replace(named, image_size=read.image_size, **ways[named.version - 1])

    return meant


def _told_unit(row: Row, state: State) -> Row:
    """Offsets of version 2 are divided by the reach of the window that was trained with first, which only the values of
    the saved table tell: its largest is log2(8 (w - 1) / (t - 1) + 1) / 3 with windows of w now, and of t then.
    """
    assert isinstance(row, SwinConfig)
    names = [f"{at(ORIGINAL.block, s)}.attn.relative_coords_table" for s in range(len(row.depths))]
    if row.version == 1 or not all(name in state for name in names):
        return row
    reach = [(2 ** (3 * float(state[name].max())) - 1) / 8 for name in names]
    if not all(0 < share < math.inf for share in reach):
        return row  # windows of a single token
    trained = tuple(round((w - 1) / share) + 1 for w, share in zip(row.windows, reach, strict=True))
    return replace(row, trained_windows=None if trained == row.windows else trained)


def _original_row(shapes: Shapes, config: Mapping[str, Any]) -> SwinConfig:
    return replace(_from_shapes(shapes, ORIGINAL, HINT), **LIKE_TIMM)  # theirs takes no size but its own


TORCHVISION_EDGES = {  # of the six that are published: version, blocks of the third stage, width -> pixels to crop from
    (1, 6, 96): 232,
    (1, 18, 96): 246,
    (1, 18, 128): 238,
    (2, 6, 96): 260,
    (2, 18, 96): 260,
    (2, 18, 128): 272,
}


def _torchvision_preprocessing(row: Row) -> PreprocessingConfig:
    assert isinstance(row, SwinConfig)
    edge = TORCHVISION_EDGES.get((row.version, row.depths[2] if len(row.depths) > 2 else 0, row.dim))
    return PreprocessingConfig(stride=32, crop=(224 if row.version == 1 else 256) / edge if edge else 0.96)


def _torchvision_row(shapes: Shapes, config: Mapping[str, Any]) -> SwinConfig:
    return _from_shapes(shapes, TORCHVISION, HINT)


# --- timm ------------------------------------------------------------------------------------------------------------

TIMM_NAMES = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
    "swin_base_384": "swin_base_patch4_window12_384",
    "swin_large_384": "swin_large_patch4_window12_384",
    "swinv2_tiny": "swinv2_tiny_window8_256",
    "swinv2_small": "swinv2_small_window8_256",
    "swinv2_base": "swinv2_base_window8_256",
    "swinv2_tiny_window16": "swinv2_tiny_window16_256",
    "swinv2_small_window16": "swinv2_small_window16_256",
    "swinv2_base_window16": "swinv2_base_window16_256",
    "swinv2_base_window12": "swinv2_base_window12_192",
    "swinv2_large_window12": "swinv2_large_window12_192",
    "swinv2_base_window12to16": "swinv2_base_window12to16_192to256",
    "swinv2_base_window12to24": "swinv2_base_window12to24_192to384",
    "swinv2_large_window12to16": "swinv2_large_window12to16_192to256",
    "swinv2_large_window12to24": "swinv2_large_window12to24_192to384",
}
TIMM_NAME = re.compile(r"swin(v2)?_[a-z0-9_]*?window(\d+)(?:to(\d+))?_(?:\d+to)?(\d+)$")


def _timm_row(shapes: Shapes, config: Mapping[str, Any]) -> SwinConfig:
    row = replace(_form(shapes, TIMM), **LIKE_TIMM)
    arguments = config.get("model_args") or {}
    if arguments.get("always_partition"):
        raise UserError("config.json: a Swin with always_partition is not supported")
    match = TIMM_NAME.match(str(config.get("architecture") or "").split(".")[0])
    size = arguments.get("img_size") or (config.get("pretrained_cfg") or {}).get("input_size") or match and match[4]
    if isinstance(size, list | tuple):
        if size[-1] != size[-2]:
            raise UserError(f"config.json: a Swin for pictures of {size} pixels is not supported, only for squares")
        size = size[-1]
    if row.version == 1:
        return replace(row, image_size=int(size) if size else row.stride * row.windows[-1])
    window = arguments.get("window_size") or match and int(match[3] or match[2])
    if not window or not size:
        return replace(_from_shapes(shapes, TIMM, HINT), **LIKE_TIMM)
    trained = arguments.get("pretrained_window_sizes") or _timm_trained(match)
    row = replace(row, image_size=int(size), trained_windows=tuple(trained) if trained and any(trained) else None)
    if isinstance(window, int):
        return _fitted(row, window, row.image_size)
    return replace(row, windows=tuple(min(w, row.built_grid(s)) for s, w in enumerate(window)))


def _timm_trained(match: re.Match[str] | None) -> tuple[int, ...] | None:
    if match is None or not match[3]:
        return None
    window = int(match[2])
    return (window, window, window, window // 2)  # pretrained at 16 windows a picture


def _timm_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, SwinConfig)
    alike = (name for name in TIMM_NAMES if SWIN[name].is_like(row) and SWIN[name].image_size == row.image_size)
    known = next(alike, None)
    return {
        "architecture": TIMM_NAMES[known or ("swin_tiny" if row.version == 1 else "swinv2_tiny")],
        "num_classes": classes,
        "num_features": row.dim * 2 ** (len(row.depths) - 1),
        "pretrained_cfg": {"input_size": [3, row.image_size, row.image_size], "num_classes": classes},
        **({} if known else {"model_args": _timm_arguments(row)}),
    }


def _timm_arguments(row: SwinConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "img_size": row.image_size,
        "patch_size": row.patch_size,
        "embed_dim": row.dim,
        "depths": list(row.depths),
        "num_heads": list(row.heads),
        "window_size": list(row.windows),
        "mlp_ratio": row.mlp_ratio,
    }
    if row.version == 2 and row.trained_windows is not None:
        arguments["pretrained_window_sizes"] = list(row.trained_windows)
    return arguments


def _build_timm(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    assert isinstance(row, SwinConfig)
    if (described := as_described(config, classes, {"strict_img_size": False})) is not None:
        return described
    kind = SwinTransformer if row.version == 1 else SwinTransformerV2
    return kind(num_classes=classes, strict_img_size=False, drop_path_rate=row.drop_path, **_timm_arguments(row))


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _hf_recognises(shapes: Shapes, config: Mapping[str, Any]) -> bool:
    version = 2 if any(name.endswith("attention.self.logit_scale") for name in shapes) else 1
    prefixed = any(name.startswith(HUGGINGFACE.prefix[version - 1]) for name in shapes)
    if prefixed != bool(_classes(shapes, HUGGINGFACE)):
        return False
    kind = "swin" if version == 1 else "swinv2"
    return config.get("model_type", kind) == kind and _recognises(_bare(shapes, HUGGINGFACE), HUGGINGFACE)


def _hf_row(shapes: Shapes, config: Mapping[str, Any]) -> SwinConfig:
    standard = {"use_absolute_embeddings": False, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    for name, value in standard.items():
        if config.get(name, value) != value:
            raise UserError(f"config.json: a Swin with {name} = {config[name]!r} is not supported, only {value!r}")
    row = _form(shapes, HUGGINGFACE)
    row = replace(row, drop_path=float(config.get("drop_path_rate", row.drop_path)))
    size = config.get("image_size")
    if size is not None and not isinstance(size, int):
        if size[0] != size[1]:
            raise UserError(f"config.json: a Swin for pictures of {size} pixels is not supported, only for squares")
        size = int(size[0])
    if row.version == 1:
        return replace(row, unshifted="picture", image_size=size or row.stride * row.windows[-1])
    if size is None or "window_size" not in config:
        return replace(_from_shapes(shapes, HUGGINGFACE, HINT), **LIKE_SWINV2)
    trained = config.get("pretrained_window_sizes") or ()
    row = replace(row, **LIKE_SWINV2, trained_windows=tuple(trained) if any(trained) else None)
    return _fitted(row, int(config["window_size"]), size)


def _hf_config(row: Row, classes: int) -> dict[str, Any]:
    assert isinstance(row, SwinConfig)
    kind = "Swin" if row.version == 1 else "Swinv2"
    window = max(row.windows)
    possible = _fitted(row, window, row.image_size).windows if row.version == 2 else len(row.windows) * (window,)
    if row.windows != possible:
        raise NoWords(
            f"Hugging Face's {kind} has windows {possible} at {row.image_size} pixels, not {row.windows}; "
            f"write another dialect"
        )
    values = {
        "architectures": [f"{kind}ForImageClassification" if classes else f"{kind}Model"],
        "model_type": kind.lower(),
        "image_size": row.image_size,
        "patch_size": row.patch_size,
        "num_channels": 3,
        "embed_dim": row.dim,
        "depths": list(row.depths),
        "num_heads": list(row.heads),
        "window_size": window,
        "mlp_ratio": row.mlp_ratio,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": 1e-5,
        "drop_path_rate": row.drop_path,
        "hidden_size": row.dim * 2 ** (len(row.depths) - 1),
    }
    if row.version == 2:
        values["pretrained_window_sizes"] = list(row.trained_windows or len(row.depths) * (0,))
    return values


def _build_hf(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    import transformers

    assert isinstance(row, SwinConfig)
    values = {**stated(config, _hf_config(row, classes)), "num_labels": classes}
    if row.version == 2:
        described = transformers.Swinv2Config.from_dict(values)
        kind = transformers.Swinv2ForImageClassification if classes else transformers.Swinv2Model
        return kind(described)
    described = transformers.SwinConfig.from_dict(values)
    model = (transformers.SwinForImageClassification if classes else transformers.SwinModel)(described)
    for layer in model.modules():
        if type(layer).__name__ == "SwinLayer":
            _name_as_on_the_hub(layer)
    return model


def _name_as_on_the_hub(layer: nn.Module) -> None:
    """transformers 5 renamed the parts of a block of version 1, but not the files; here parts are called as in files.

    The code of the layer finds its parts as before, as plain attributes.
    """
    attention: Any = layer.attention
    if not hasattr(attention, "q_proj"):
        return  # transformers 4
    inner = nn.Module()
    for new, old in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        inner.add_module(new, _taken(attention, old))
    biases = attention.relative_position_bias
    table = biases.relative_position_bias_table
    del biases.relative_position_bias_table
    biases.__dict__["relative_position_bias_table"] = table
    inner.register_parameter("relative_position_bias_table", table)
    attention.add_module("self", inner)
    outer, mlp = nn.Module(), layer.mlp
    outer.add_module("dense", _taken(attention, "o_proj"))
    attention.add_module("output", outer)
    for new, old in (("intermediate", "fc1"), ("output", "fc2")):
        part = nn.Module()
        part.add_module("dense", _taken(mlp, old))
        layer.add_module(new, part)


def _taken(parent: Any, name: str) -> nn.Module:
    """A child that from now on is only an attribute of its parent."""
    child = getattr(parent, name)
    delattr(parent, name)
    parent.__dict__[name] = child
    return child


def _hf_logits(model: nn.Module, images: Tensor) -> Tensor:
    """A layer of version 1 that once saw a small map never shifts again; here every call begins anew."""
    stages: list[Any] = [module for module in model.modules() if type(module).__name__ == "SwinStage"]
    for stage in stages:
        for b, layer in enumerate(stage.blocks):
            layer.window_size = stage.config.window_size
            layer.shift_size = b % 2 * (layer.window_size // 2)
    outputs = model(images)
    return outputs.logits if hasattr(outputs, "logits") else outputs.pooler_output


# --- torchvision -----------------------------------------------------------------------------------------------------


def _torchvision_config(row: Row, classes: int) -> dict[str, Any]:
    """There is none, but not every form exists."""
    assert isinstance(row, SwinConfig)
    if len(set(row.windows)) > 1 or row.trained_windows is not None:
        raise NoWords(f"torchvision has no Swin of windows {row.windows} that was trained with others")
    return {}


def _build_torchvision(row: Row, classes: int, config: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import swin_transformer as theirs

    assert isinstance(row, SwinConfig)
    _torchvision_config(row, classes)
    kinds: dict[str, Any] = {}
    if row.version == 2:
        kinds = {"block": theirs.SwinTransformerBlockV2, "downsample_layer": theirs.PatchMergingV2}
    model = theirs.SwinTransformer(
        patch_size=[row.patch_size, row.patch_size],
        embed_dim=row.dim,
        depths=list(row.depths),
        num_heads=list(row.heads),
        window_size=[row.windows[0], row.windows[0]],
        mlp_ratio=row.mlp_ratio,
        stochastic_depth_prob=row.drop_path,
        num_classes=max(1, classes),
        **kinds,
    )
    if not classes:
        model.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _call(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


FORMATS: tuple[Format, ...] = (
    Format(
        dialect="timm",
        family=SwinConfig.family,
        recognises=lambda shapes, config: _recognises(shapes, TIMM) and not _recognises(shapes, ORIGINAL),
        row=_timm_row,
        classes=lambda shapes, config: _classes(shapes, TIMM),
        rules=lambda row, classes: swin_rules(row, classes, TIMM),
        stages=lambda row: swin_stages(row, 1, TIMM),
        write_config=_timm_config,
        ignored=IGNORED,
        peer=Peer("timm", _build_timm, _call),
        preprocessing=PreprocessingConfig(stride=32, crop=0.9),
        meant=_meant(LIKE_TIMM, LIKE_TIMM),
    ),
    Format(
        dialect="huggingface",
        family=SwinConfig.family,
        recognises=_hf_recognises,
        row=_hf_row,
        classes=lambda shapes, config: _classes(shapes, HUGGINGFACE),
        rules=lambda row, classes: swin_rules(row, classes, HUGGINGFACE),
        stages=lambda row: swin_stages(row, 1, HUGGINGFACE),
        write_config=_hf_config,
        ignored=(*IGNORED, "*embeddings.mask_token"),
        peer=Peer("transformers", _build_hf, _hf_logits),
        preprocessing=PreprocessingConfig(stride=32),
        meant=_meant({"unshifted": "picture"}, LIKE_SWINV2),
    ),
    Format(
        dialect="torchvision",
        family=SwinConfig.family,
        recognises=lambda shapes, config: _recognises(shapes, TORCHVISION),
        row=_torchvision_row,
        classes=lambda shapes, config: _classes(shapes, TORCHVISION),
        rules=lambda row, classes: swin_rules(row, classes, TORCHVISION),
        stages=lambda row: swin_stages(row, 1, TORCHVISION),
        write_config=_torchvision_config,
        ignored=IGNORED,
        peer=Peer("torchvision", _build_torchvision, _call),
        preprocessing=_torchvision_preprocessing,
        meant=_meant({}, {}),
    ),
    Format(
        dialect="original",
        family=SwinConfig.family,
        recognises=lambda shapes, config: _recognises(shapes, ORIGINAL),
        row=_original_row,
        classes=lambda shapes, config: _classes(shapes, ORIGINAL),
        rules=lambda row, classes: swin_rules(row, classes, ORIGINAL),
        stages=lambda row: [],
        write_config=lambda row, classes: {},
        ignored=IGNORED,
        preprocessing=PreprocessingConfig(stride=32, crop=0.875),
        told=_told_unit,
        meant=_meant(LIKE_TIMM, LIKE_TIMM),
    ),
)

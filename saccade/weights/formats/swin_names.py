"""The tensors of Swin, for any dialect that only names and cuts them differently.

All merge 2x2 neighbours in the same order, down the columns first. The merging between two stages belongs to the later
one in timm, and to the earlier one elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.backbones.base import Row
from saccade.backbones.swin import SwinConfig
from saccade.weights.formats.table import Rule, Stage, module, packed, same


@dataclass(frozen=True)
class Names:
    """Patterns of a dialect: s counts stages and b blocks from 0, t is s + 1, o is 2 s + 1, e is 2 s + 2."""

    patches: str
    patch_norm: str
    block: str
    merge: str  # by the stage before it
    norms: tuple[str, str]
    qkv: tuple[str, ...]  # one matrix, or three
    biases: tuple[str, ...]  # in version 2: of queries and values, or of all three in one
    out: str
    table: str
    logit_scale: str
    mlp_of_bias: str
    mlp: tuple[str, str]
    norm: str
    head: str
    prefix: tuple[str, str] = ("", "")  # of all but the head where there is one; per version


TIMM = Names(
    patches="patch_embed.proj",
    patch_norm="patch_embed.norm",
    block="layers.{s}.blocks.{b}",
    merge="layers.{t}.downsample",
    norms=("norm1", "norm2"),
    qkv=("attn.qkv",),
    biases=("attn.q_bias", "attn.v_bias"),
    out="attn.proj",
    table="attn.relative_position_bias_table",
    logit_scale="attn.logit_scale",
    mlp_of_bias="attn.cpb_mlp",
    mlp=("mlp.fc1", "mlp.fc2"),
    norm="norm",
    head="head.fc",
)
ORIGINAL = replace(TIMM, merge="layers.{s}.downsample", head="head")
TORCHVISION = replace(
    TIMM,
    patches="features.0.0",
    patch_norm="features.0.2",
    block="features.{o}.{b}",
    merge="features.{e}",
    biases=("attn.qkv.bias",),
    mlp=("mlp.0", "mlp.3"),
    head="head",
)
HUGGINGFACE = Names(
    patches="embeddings.patch_embeddings.projection",
    patch_norm="embeddings.norm",
    block="encoder.layers.{s}.blocks.{b}",
    merge="encoder.layers.{s}.downsample",
    norms=("layernorm_before", "layernorm_after"),
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    biases=("attention.self.query.bias", "attention.self.value.bias"),
    out="attention.output.dense",
    table="attention.self.relative_position_bias_table",
    logit_scale="attention.self.logit_scale",
    mlp_of_bias="attention.self.continuous_position_bias_mlp",
    mlp=("intermediate.dense", "output.dense"),
    norm="layernorm",
    head="classifier",
    prefix=("swin.", "swinv2."),
)
IGNORED = ("*.relative_position_index", "*.relative_coords_table", "*.attn_mask")  # computed from the window's size


# --- rules -----------------------------------------------------------------------------------------------------------


def at(pattern: str, stage: int, block: int = 0) -> str:
    return pattern.format(s=stage, t=stage + 1, o=2 * stage + 1, e=2 * stage + 2, b=block)


def _prefix(row: SwinConfig, classes: int, names: Names) -> str:
    return names.prefix[row.version - 1] if classes else ""


def swin_rules(row: Row, classes: int, names: Names) -> list[Rule]:
    assert isinstance(row, SwinConfig)
    p = _prefix(row, classes, names)
    rules = module("backbone.patches.projection", p + names.patches)
    rules += module("backbone.patch_norm", p + names.patch_norm)
    for s, depth in enumerate(row.depths):
        for b in range(depth):
            rules += _block_rules(row, f"backbone.stages.{s}.{b}", p + at(names.block, s, b), names)
        if s < len(row.depths) - 1:
            merge = p + at(names.merge, s)
            rules += module(f"backbone.merges.{s}.norm", f"{merge}.norm")
            rules.append(same(f"backbone.merges.{s}.reduction.weight", f"{merge}.reduction.weight"))
    rules += module("backbone.norm", p + names.norm)
    return rules + (module("head", names.head) if classes else [])


def _block_rules(row: SwinConfig, ours: str, theirs: str, names: Names) -> list[Rule]:
    rules = [rule for i in (0, 1) for rule in module(f"{ours}.norm{i + 1}", f"{theirs}.{names.norms[i]}")]
    rules += module(f"{ours}.mlp.up", f"{theirs}.{names.mlp[0]}")
    rules += module(f"{ours}.mlp.down", f"{theirs}.{names.mlp[1]}")
    rules += module(f"{ours}.attention.out", f"{theirs}.{names.out}")
    rules.append(packed(f"{ours}.attention.qkv.weight", *(f"{theirs}.{name}.weight" for name in names.qkv)))
    if row.version == 1:
        rules.append(packed(f"{ours}.attention.qkv.bias", *(f"{theirs}.{name}.bias" for name in names.qkv)))
        return [*rules, same(f"{ours}.attention.bias.table", f"{theirs}.{names.table}")]
    rules.append(_bias_rule(f"{ours}.attention.query_value_bias", tuple(f"{theirs}.{name}" for name in names.biases)))
    rules.append(same(f"{ours}.attention.logit_scale", f"{theirs}.{names.logit_scale}"))
    rules += module(f"{ours}.attention.bias.up", f"{theirs}.{names.mlp_of_bias}.0")
    return [*rules, same(f"{ours}.attention.bias.down.weight", f"{theirs}.{names.mlp_of_bias}.2.weight")]


def _bias_rule(ours: str, theirs: tuple[str, ...]) -> Rule:
    if len(theirs) == 2:
        return packed(ours, *theirs)

    def read(whole: Tensor) -> Tensor:
        of_q, _, of_v = whole.view(3, -1)  # that of keys is never used
        return torch.cat((of_q, of_v))

    def write(pair: Tensor) -> tuple[Tensor]:
        of_q, of_v = pair.chunk(2)
        return (torch.cat((of_q, torch.zeros_like(of_q), of_v)),)

    return Rule(ours, theirs, read, write)


def swin_stages(row: Row, classes: int, names: Names) -> list[Stage]:
    """Outputs of blocks and of mergings, as (B, h w, C)."""
    assert isinstance(row, SwinConfig)
    p = _prefix(row, classes, names)
    stages = []
    for s, depth in enumerate(row.depths):
        for b in range(depth):
            title = f"stage {s + 1}, block {b + 1}"
            stages.append(Stage(title, f"backbone.stages.{s}.{b}", p + at(names.block, s, b), _tokens, _rows))
        if s < len(row.depths) - 1:
            title = f"merging after stage {s + 1}"
            stages.append(Stage(title, f"backbone.merges.{s}", p + at(names.merge, s), _tokens, _rows))
    return stages


def _tokens(output: Any) -> Tensor:
    return output.rows().flatten(1, 2)


def _rows(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    return tensor.flatten(1, 2) if tensor.ndim == 4 else tensor

"""The tensors of the ViT family: what each is made of, for any dialect that only names and cuts them differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.backbones.base import Row
from saccade.backbones.vit import ViTConfig
from saccade.errors import UserError
from saccade.layers.feedforward import SWIGLU
from saccade.weights.formats.table import NoWords, Rule, Shapes, Stage, module, packed, same


@dataclass(frozen=True)
class Names:
    """A dialect's names. `*` stands for weight and bias.

    Names of a block's parts follow `block`, where {i} counts blocks from 0 and {c} says in which quarter it lies.
    """

    patches: str
    class_tokens: tuple[str, ...]  # class token, distillation token
    registers: str
    positions: str
    block: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]  # one matrix, or three
    out: str
    mlp: tuple[str, str]
    gate_up: tuple[str, ...]  # of SwiGLU: one matrix, or two
    gate_down: str
    scales: tuple[str, str]
    norm: str
    head: tuple[str, ...]  # also that of the distillation token
    prefix: str = ""  # before all of the above, but for heads
    biases: tuple[str, ...] = ()  # of queries and values, where they do not follow from `qkv`
    pre_norm: str = ""
    pooled_norm: str = ""  # where it is not `norm`
    projection: str = ""
    pooling: str = ""  # of the attention-pooling head
    pooling_query: str = ""
    pooling_qkv: tuple[str, ...] = ()  # all in one, or queries and then keys with values
    pooling_rest: tuple[str, str, str, str] = ("", "", "", "")  # out, norm, up, down
    flat: bool = False  # tables of positions are (N, C), a class token is (C,)
    register_positions: bool = False  # where tokens without a patch have places in the table: registers, too


def vit_rules(row: ViTConfig, classes: int, names: Names) -> list[Rule]:
    """Every tensor of a plain ViT."""
    if row.stem or row.pool == "sequence" or row.attention != "full":
        raise NoWords("a convolutional stem, sequence pooling or another attention than full has no place elsewhere")
    p = names.prefix
    patches = ("weight",) if row.pre_norm else ("weight", "bias")
    rules = module("backbone.patches.projection", p + names.patches, *patches)
    rules += _token_rules(row, names)
    if row.pre_norm:
        rules += module("backbone.pre_norm", p + _needed(names.pre_norm, "a norm before the blocks"))
    for i in range(row.depth):
        rules += _block_rules(row, f"backbone.blocks.{i}", p + block_name(names, row, i), names)
    rules += module("backbone.norm", p + last_norm(names, row))
    if row.pool == "attention":
        if row.mlp == SWIGLU:
            raise NoWords("attention pooling with a gated feed-forward network has no place elsewhere")
        rules += _pooling_rules(p + _needed(names.pooling, "attention pooling"), names)
    if row.projection:
        rules.append(same("backbone.projection.weight", _needed(names.projection, "a projection")))
    return rules + (_head_rules(row, names) if classes else [])


def last_norm(names: Names, row: ViTConfig) -> str:
    return names.pooled_norm if row.norm_pooled and names.pooled_norm else names.norm


def block_name(names: Names, row: ViTConfig, i: int) -> str:
    return names.block.format(i=i, c=i // max(1, row.depth // 4))


def _needed(name: str, what: str) -> str:
    if not name:
        raise NoWords(f"this dialect of weights has no place for {what}")
    return name


# --- tokens and positions --------------------------------------------------------------------------------------------


def extra_rows(row: ViTConfig, names: Names) -> int:
    """Rows of the table of positions that belong to tokens without a patch."""
    if not row.class_position:
        return 0
    return row.prefix if names.register_positions else row.class_tokens


def _token_rules(row: ViTConfig, names: Names) -> list[Rule]:
    """Their tokens have places of their own in the table; in ours, token and place are one sum."""
    p, K, R = names.prefix, row.class_tokens, row.registers
    learned = row.position == "learned"
    extra = extra_rows(row, names) if learned else 0
    table = p + names.positions
    rules = []
    if K:
        parts = tuple(p + name for name in names.class_tokens[:K])
        if len(parts) < K:
            _needed("", "a distillation token")
        rules.append(_token_rule("backbone.class_token", parts, table, range(0, K) if extra else None, names.flat))
    if R:
        place = range(K, K + R) if extra > K else None
        rules.append(_token_rule("backbone.registers", (p + names.registers,), table, place, names.flat))
    # after the tokens, which write a place-holder for the table
    return rules + ([_position_rule(table, extra, names.flat)] if learned else [])


def _rows(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.ndim == 1 else tensor.flatten(0, -2)


def _token_rule(ours: str, parts: tuple[str, ...], table: str, place: range | None, flat: bool) -> Rule:
    """Tokens (K, C) of one or several of theirs, and their places in the table, if they have any."""

    def tokens(*theirs: Tensor) -> Tensor:
        return torch.cat([_rows(each) for each in theirs[: len(parts)]])

    def read(*theirs: Tensor) -> Tensor:
        if place is None:
            return tokens(*theirs)
        return tokens(*theirs) + _rows(theirs[-1])[place.start : place.stop]

    def write(whole: Tensor) -> tuple[Tensor, ...]:
        pieces = [whole] if len(parts) == 1 else list(whole.split(1))
        cut = tuple(piece[0] if flat else piece[None] for piece in pieces)
        return cut if place is None else (*cut, whole.new_zeros(0))  # the rule of positions writes the table

    return Rule(ours, parts if place is None else (*parts, table), read, write, tokens)


def _position_rule(table: str, extra: int, flat: bool) -> Rule:
    def write(whole: Tensor) -> tuple[Tensor]:
        rows = torch.cat((whole.new_zeros(extra, whole.shape[1]), whole))
        return (rows if flat else rows[None],)

    return Rule("backbone.positions.table", (table,), lambda tensor: _rows(tensor)[extra:], write)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _named(prefix: str, names: tuple[str, ...], part: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name.replace('*', part)}" for name in names)


def _linear(ours: str, prefix: str, *names: str) -> list[Rule]:
    return [packed(f"{ours}.{part}", *_named(prefix, names, part)) for part in ("weight", "bias")]


def _block_rules(row: ViTConfig, ours: str, theirs: str, names: Names) -> list[Rule]:
    rules = [*_linear(f"{ours}.norm1", theirs, names.norms[0]), *_linear(f"{ours}.norm2", theirs, names.norms[1])]
    rules.append(packed(f"{ours}.attention.qkv.weight", *_named(theirs, names.qkv, "weight")))
    if row.qkv_bias:
        rules.append(_bias_rule(row, f"{ours}.attention", theirs, names))
    rules += _linear(f"{ours}.attention.out", theirs, names.out)
    if row.mlp == SWIGLU:
        rules += _linear(f"{ours}.mlp.gate_up", theirs, *(names.gate_up or (_needed("", "SwiGLU"),)))
        rules += _linear(f"{ours}.mlp.down", theirs, names.gate_down)
    else:
        rules += _linear(f"{ours}.mlp.up", theirs, names.mlp[0]) + _linear(f"{ours}.mlp.down", theirs, names.mlp[1])
    if row.layer_scale is not None:
        for i, name in enumerate(names.scales):
            rules.append(same(f"{ours}.scale{i + 1}.scale", f"{theirs}.{_needed(name, 'LayerScale')}"))
    return rules


def _bias_rule(row: ViTConfig, ours: str, theirs: str, names: Names) -> Rule:
    whole = _named(theirs, names.qkv, "bias")
    if row.key_bias:
        if names.biases:
            _needed("", "a bias of keys")
        return packed(f"{ours}.qkv.bias", *whole)
    without_keys = names.biases or (names.qkv[0], names.qkv[-1])
    if len(names.qkv) == 3 or names.biases:
        return packed(f"{ours}.query_value_bias", *_named(theirs, without_keys, "bias"))
    return _bias_with_zeros(f"{ours}.query_value_bias", whole[0], row.dim)


def _bias_with_zeros(ours: str, theirs: str, dim: int) -> Rule:
    """Theirs has a place for keys, too, which is zero."""

    def read(bias: Tensor) -> Tensor:
        q, _, v = bias.split([dim, dim, dim])
        return torch.cat((q, v))

    def write(bias: Tensor) -> tuple[Tensor]:
        q, v = bias.chunk(2)
        return (torch.cat((q, torch.zeros_like(q), v)),)

    return Rule(ours, (theirs,), read, write)


# --- heads -----------------------------------------------------------------------------------------------------------


def _pooling_rules(theirs: str, names: Names) -> list[Rule]:
    ours = "backbone.pooling"
    out, norm, up, down = names.pooling_rest
    query = Rule(
        f"{ours}.query", (f"{theirs}.{names.pooling_query}",), lambda probe: probe[0, 0], lambda q: (q[None, None],)
    )
    rules = [query]
    for part in ("weight", "bias"):
        parts = _named(theirs, names.pooling_qkv, part)
        rules.append(
            _uneven(f"{ours}.attention.qkv.{part}", *parts)
            if len(parts) == 2
            else same(f"{ours}.attention.qkv.{part}", parts[0])
        )
    rules += _linear(f"{ours}.attention.out", theirs, out) + _linear(f"{ours}.norm", theirs, norm)
    return rules + _linear(f"{ours}.mlp.up", theirs, up) + _linear(f"{ours}.mlp.down", theirs, down)


def _uneven(ours: str, queries: str, keys_values: str) -> Rule:
    def write(whole: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = whole.chunk(3)
        return q, torch.cat((k, v))

    return Rule(ours, (queries, keys_values), lambda q, kv: torch.cat((q, kv)), write)


def _head_rules(row: ViTConfig, names: Names) -> list[Rule]:
    if row.pool != "distilled":
        return module("head", names.head[0])
    one, two = names.head[0], _needed("".join(names.head[1:]), "a head on the distillation token")
    # the mean of two linear maps is one of both vectors, with half of the weights; exact, and so is its reverse
    weight = Rule(
        "head.weight",
        (f"{one}.weight", f"{two}.weight"),
        lambda a, b: torch.cat((a, b), dim=1) / 2,
        lambda whole: tuple(2 * half for half in whole.chunk(2, dim=1)),
        lambda a, b: 2 * torch.cat((a, b), dim=1),
    )
    bias = Rule(
        "head.bias",
        (f"{one}.bias", f"{two}.bias"),
        lambda a, b: (a + b) / 2,
        lambda whole: (whole, whole),
        lambda a, b: a + b,
    )
    return [weight, bias]


# --- stages ----------------------------------------------------------------------------------------------------------


def vit_stages(row: ViTConfig, names: Names, inside: str = "") -> list[Stage]:
    """What can be seen of both: patches and every block. The last block of ours may compute class tokens alone, where
    these are the summary. `inside` is the path of their network in the reference model."""
    p, K = inside + names.prefix, row.class_tokens
    alone = K if row.pool in ("token", "distilled") else None
    stages = [Stage("patches", "backbone.patches", p + names.patches)]
    if row.pre_norm:
        stages.append(Stage("norm before blocks", "backbone.pre_norm", p + names.pre_norm))
    for i in range(row.depth):
        cut = _first(alone) if i == row.depth - 1 and alone else first_output
        stages.append(Stage(f"block {i}", f"backbone.blocks.{i}", p + block_name(names, row, i), cut, cut))
    return stages


def first_output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _first(count: int) -> Callable[[Any], Tensor]:
    return lambda output: first_output(output)[:, :count]


# --- what shapes tell ------------------------------------------------------------------------------------------------


def grid_side(rows: int, extra: int) -> tuple[int, bool]:
    """The side of the square grid that a table of positions covers, and whether `extra` other tokens have places."""
    for tokens, others in ((rows, False), (rows - extra, True)):
        side = round(max(0, tokens) ** 0.5)
        if side > 0 and side * side == tokens:
            return side, others and extra > 0
    raise UserError(f"a table of {rows} positions is no square grid; such a model cannot be read")


WIDE_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 4096: 32}  # heads by width, where they are not 64 wide each


def likely_heads(dim: int, *, rotary: bool = False) -> int:
    """Shapes do not tell it: heads are taken to be 64 wide, but for the known sizes where they are not."""
    return dim // 64 if dim not in WIDE_HEADS or (rotary and dim == 1280) else WIDE_HEADS[dim]


def depth_of(shapes: Shapes, before: str) -> int:
    """How many blocks there are, of keys `before` + number + `.`."""
    numbers = {name[len(before) :].split(".")[0] for name in shapes if name.startswith(before)}
    return len({number for number in numbers if number.isdigit()})


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"looks like a ViT, but {name} is missing: is the file complete?")
    return shapes[name]


def meant(named: Row, read: Row, described: bool) -> Row:
    """What was read, with what a name says that shapes leave open. A config.json says that, too."""
    assert isinstance(named, ViTConfig) and isinstance(read, ViTConfig)
    for size in ("dim", "depth", "hidden", "patch_size"):
        ours, theirs = getattr(named, size), getattr(read, size)
        if ours != theirs:
            raise UserError(f"--model means a {size} of {ours}, but the weights have {theirs}; leave it out")
    if described:
        return read
    activation = read.mlp if SWIGLU in (read.mlp, named.mlp) else named.mlp
    return replace(read, heads=named.heads, norm_eps=named.norm_eps, mlp=activation)

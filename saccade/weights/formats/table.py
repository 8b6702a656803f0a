"""A dialect of weights: a table of renames that is read both ways, pure `dict -> dict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.models.detector import BoxTargets, DetectionOutputs


class NoWords(UserError):
    """A dialect cannot express a model of this form: others that the family has may."""


State = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """One of our tensors, and the ones of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    read: Callable[..., Tensor]  # (*theirs) -> ours
    write: Callable[[Tensor], tuple[Tensor, ...]]  # ours -> theirs
    gradient: Callable[..., Tensor] | None = None  # (*gradients of theirs) -> gradient of ours; None: as `read`
    default: Callable[[], Tensor] | None = None  # ours where older files have none of theirs; None: that is a fault


def same(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), lambda tensor: tensor, lambda tensor: (tensor,))


def module(ours: str, theirs: str, *names: str) -> list[Rule]:
    """`same` for several parameters of one module; by default weight and bias."""
    return [same(f"{ours}.{name}", f"{theirs}.{name}") for name in names or ("weight", "bias")]


def packed(ours: str, *theirs: str) -> Rule:
    """Several matrices or vectors of equal length one above the other, such as queries, keys and values."""
    return Rule(ours, theirs, lambda *parts: torch.cat(parts), lambda whole: tuple(whole.chunk(len(theirs))))


def copied(ours: str, *theirs: str) -> Rule:
    """One tensor that their files hold several times, because several of their modules are one."""
    return Rule(ours, theirs, _the_one, lambda tensor: (tensor,) * len(theirs), gradient=lambda first, *others: first)


def _the_one(first: Tensor, *others: Tensor) -> Tensor:
    if far := [other for other in others if not torch.equal(first, other)]:
        raise ValueError(f"should be the same tensor {1 + len(others)} times, but {len(far)} of them differ")
    return first


@dataclass(frozen=True)
class Stage:
    """Two modules whose outputs must agree, with functions that bring either output into the same layout."""

    name: str
    ours: str  # path of a module in our network
    theirs: str
    ours_as: Callable[[Any], Tensor] | None = None
    theirs_as: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Peer:
    """How a reference model is built and called."""

    package: str  # whose version counts
    build: Callable[[Row, int, Mapping[str, Any]], nn.Module]  # (row, classes, config) -> model with random weights
    logits: Callable[[nn.Module, Tensor], Tensor]  # normalised pictures -> logits, or the summary without classes


@dataclass(frozen=True)
class ReferenceLoss:
    """What a reference's own loss says of its outputs. Names have the form of `part_of`."""

    terms: dict[str, Tensor]  # weighted scalars, whose sum is learnt from
    matched: dict[str, Tensor]  # for each thing of the batch the number of its query (M,), -1 where it has none


def part_of(layer: str, what: str) -> str:
    """The name of a part of a detector's loss, such as `layer 6: giou`; the layers are `layer 1`, ..., `proposals`."""
    return f"{layer}: {what}"


@dataclass(frozen=True)
class DetectorPeer(Peer):
    """`logits` are those of the last layer."""

    outputs: Callable[[nn.Module, Tensor], DetectionOutputs]  # normalised pictures -> all that can be compared
    loss: Callable[[nn.Module, DetectionOutputs, BoxTargets], ReferenceLoss]


@dataclass(frozen=True)
class TranslatorPeer:
    """How a reference model of texts is built and called. Padding is the one that the model knows."""

    package: str  # whose version counts
    build: Callable[[Row, int, Mapping[str, Any]], nn.Module]  # (row, 0, config) -> model with random weights
    # (model, texts (B, S), translations (B, T)) -> logits (B, T, V), and the mean loss of all tokens but padding
    outputs: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    # (model, texts (B, S), most tokens with the end, beams; 1: greedy) -> tokens of each translation without the end
    translate: Callable[[nn.Module, Tensor, int, int], list[list[int]]]
    # (files of the tokenizer by name, texts, are they translations) -> tokens of each with the end
    encode: Callable[[Mapping[str, bytes], Sequence[str], bool], list[list[int]]]


@dataclass(frozen=True)
class Format:
    """A family of models in a dialect.

    `config` is the parsed `config.json` beside the weights, empty for a bare file. `rules(row, classes)` names every
    tensor of our network (`backbone...`, and `head.weight`, `head.bias` where there are classes). The first of several
    formats of one dialect and family whose `write_config` has words for a model is the one that is written.
    """

    dialect: str  # timm, huggingface, torchvision, original
    family: str
    recognises: Callable[[Shapes, Mapping[str, Any]], bool]
    row: Callable[[Shapes, Mapping[str, Any]], Row]  # the architecture, from config and shapes
    classes: Callable[[Shapes, Mapping[str, Any]], int]  # 0: no head
    rules: Callable[[Row, int], list[Rule]]
    stages: Callable[[Row], list[Stage]]
    write_config: Callable[[Row, int], dict[str, Any]]  # their config.json; class names and such are added by others
    ignored: tuple[str, ...] = ()  # patterns of keys that carry nothing to learn (index buffers, mask tokens)
    peer: Any = None  # of a model of pictures a Peer, of a detector a DetectorPeer, of texts a TranslatorPeer; or None
    # where the source says nothing; or by the form
    preprocessing: PreprocessingConfig | Callable[[Row], PreprocessingConfig] | None = None
    processor: Callable[[PreprocessingConfig], dict[str, Any]] | None = None  # their own words in preprocessor_config
    # (tensors, config) -> the tensors with those that a file leaves out because it holds them under another name
    complete: Callable[[State, Mapping[str, Any]], State] | None = None
    # (files beside the weights by name, what messages call them) -> the tokenizer for our model file
    tokenizer: Callable[[Mapping[str, bytes], str], str] | None = None
    # (form, tensors) -> the form with what values tell and shapes do not
    told: Callable[[Row, State], Row] | None = None
    # (a row of our table, the form as it was read, is there a config.json) -> the form that is meant by the row's name
    meant: Callable[[Row, Row, bool], Row] | None = None

    def usual(self, row: Row) -> PreprocessingConfig | None:
        """How pictures are prepared where the source says nothing."""
        return self.preprocessing(row) if callable(self.preprocessing) else self.preprocessing

    @property
    def name(self) -> str:
        return f"{self.dialect} {self.family}"


def read_state(theirs: State, rules: Sequence[Rule], ignored: Sequence[str], where: str) -> dict[str, Tensor]:
    """Theirs as ours. Every missing and every left-over key is listed in one UserError. Nothing is skipped silently."""
    used = {name for rule in rules for name in rule.theirs}
    absent = [rule for rule in rules if rule.default is not None and not theirs.keys() & {*rule.theirs}]
    missing = sorted(used - theirs.keys() - {name for rule in absent for name in rule.theirs})
    over = [name for name in theirs if name not in used and not any(fnmatchcase(name, each) for each in ignored)]
    faults = [f"missing: {name}" for name in missing]
    faults += [f"left over: {name} {tuple(theirs[name].shape)}" for name in over]
    ours: dict[str, Tensor] = {rule.ours: rule.default() for rule in absent if rule.default is not None}
    for rule in rules:
        if all(name in theirs for name in rule.theirs):
            try:
                ours[rule.ours] = rule.read(*(theirs[name] for name in rule.theirs))
            except (RuntimeError, IndexError, ValueError) as error:
                shapes = ", ".join(f"{name} {tuple(theirs[name].shape)}" for name in rule.theirs)
                faults.append(f"unfit: {shapes} ({error})")
    if faults:
        shown = "".join(f"\n  {fault}" for fault in faults[:40])
        more = f"\n  and {len(faults) - 40} more" if len(faults) > 40 else ""
        raise UserError(f"{where}: the weights do not fit ({len(faults)} faults):{shown}{more}")
    return ours


def write_state(ours: State, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Ours as theirs, the exact reverse of `read_state`."""
    theirs: dict[str, Tensor] = {}
    for rule in rules:
        theirs.update(zip(rule.theirs, rule.write(ours[rule.ours]), strict=True))
    return {name: tensor.contiguous().clone() for name, tensor in theirs.items()}


def read_gradients(theirs: State, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The gradients of a reference model under our names. A parameter of theirs without one counts as zeros."""
    return {rule.ours: (rule.gradient or rule.read)(*(theirs[name] for name in rule.theirs)) for rule in rules}

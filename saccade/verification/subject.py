"""Weights that are to be verified, in both forms, and both models that are built of them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones import build_backbone
from saccade.backbones.base import Row
from saccade.backbones.vit import ViTConfig
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.models import build_network, read_row
from saccade.models.detector import Detector, DetectorRow
from saccade.models.translator import Translator, TranslatorRow
from saccade.verification.compare import DTYPES, Network, load_reference
from saccade.weights.formats import FORMATS
from saccade.weights.formats.table import Format, NoWords, Rule, State, read_state, write_state
from saccade.weights.load import is_ours, load_weights


@dataclass(frozen=True)
class Subject:
    """Weights in both forms, and what is needed to build both models."""

    source: str
    format: Format  # of `theirs`
    row: Row
    classes: int
    config: Mapping[str, Any]
    ours: dict[str, Tensor]
    theirs: Mapping[str, Tensor]
    preprocessing: PreprocessingConfig
    written: bool = False  # `theirs` were written from ours, because the source's own dialect has no reference code
    notes: tuple[str, ...] = ()  # what was assumed and left aside when the source was read
    tokenizer: str | None = None  # of a model of texts, as its model file holds it

    @property
    def rules(self) -> list[Rule]:
        return self.format.rules(self.row, self.classes)

    def network(self, dtype: str) -> Network | Detector | Translator:
        """Ours. Where a rule computes (such as a sum of two tensors) and float32 rounded it, float64 is not rounded."""
        wide = {name: value.double() if value.is_floating_point() else value for name, value in self.theirs.items()}
        exact = read_state(wide, self.rules, self.format.ignored, self.source)
        weights = {
            name: exact[name] if torch.equal(exact[name].to(value.dtype), value) else value
            for name, value in self.ours.items()
        }
        if isinstance(self.row, DetectorRow | TranslatorRow):
            network = build_network(self.row, self.classes)
            assert isinstance(network, Detector | Translator)
        else:
            network = Network(build_backbone(self.row), self.classes)
        network.to(DTYPES[dtype]).load_state_dict(weights)
        return network.eval()

    def reference(self) -> nn.Module:
        assert self.format.peer is not None
        # what we wrote says of the source what we read; only what the source itself says can contradict it
        config = {} if self.written and not isinstance(self.row, TranslatorRow) else self.config
        model = self.format.peer.build(self.row, self.classes, config)
        patterns = self.format.ignored
        return load_reference(
            model, self.theirs, lambda name: any(fnmatchcase(name, pattern) for pattern in patterns), self.source
        )


def open_subject(source: str, model: str | None = None, branch: str | None = None) -> Subject:
    """Weights from wherever they are. Those of saccade itself are written in a dialect that has a reference."""
    if is_ours(Path(source)):
        loaded = load_weights(source)
        row, classes = read_row(loaded.card.architecture, loaded.where), len(loaded.card.class_names)
        notes: tuple[str, ...] = ()
        if isinstance(row, ViTConfig) and row.merge_tokens:
            row = replace(row, merge_tokens=0)
            notes = ("compared without merging of tokens, which the reference has not",)
        written = _write_for_reference(row, classes, loaded.weights)
        if written is None:
            raise UserError(f"{source}: no reference code is known for such a model ({row.family}, {row.about})")
        form, theirs = written
        config = form.write_config(row, classes)
        preprocessing = loaded.card.preprocessing
        tokenizer = loaded.card.tokenizer
        return Subject(
            source, form, row, classes, config, loaded.weights, theirs, preprocessing, True, notes, tokenizer
        )
    from saccade.weights.convert import import_weights
    from saccade.weights.source import open_weights

    raw = open_weights(source, branch=branch)
    found = import_weights(raw, model=model)
    form, config, theirs = found.format, raw.config, found.theirs
    written = _write_for_reference(found.row, found.classes, found.weights) if form.peer is None else None
    if written is not None:
        form, theirs = written
        config = form.write_config(found.row, found.classes)
    else:  # what older files lack has a default here, which the reference is given, too
        rules = form.rules(found.row, found.classes)
        defaults = write_state(found.weights, [rule for rule in rules if not theirs.keys() & {*rule.theirs}])
        theirs = {**defaults, **theirs}
    return Subject(
        source,
        form,
        found.row,
        found.classes,
        config,
        dict(found.weights),
        theirs,
        found.preprocessing,
        written is not None,
        (*raw.notes, *found.notes),
        found.tokenizer,
    )


def _write_for_reference(row: Row, classes: int, ours: State) -> tuple[Format, dict[str, Tensor]] | None:
    """Our weights in the first dialect that has reference code and can express this model."""
    for form in FORMATS:
        if form.family == row.family and form.peer is not None:
            try:
                form.write_config(row, classes)
                return form, write_state(ours, form.rules(row, classes))
            except NoWords:
                continue
    return None


def needed_peer(subject: Subject) -> str:
    """The package that holds the reference code, which must be installed."""
    peer = subject.format.peer
    if peer is None:
        raise UserError(
            f"{subject.source}: for the dialect {subject.format.name!r} no reference code is known that could be run; "
            "give --certificate FILE, or the same weights in the dialect of timm or transformers"
        )
    try:
        importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{subject.source}: the reference code is in {peer.package}, which is not installed; `pip install "
            f"{peer.package}` (or saccade[peers]), or compare with recorded answers: --certificate FILE"
        ) from None
    return peer.package

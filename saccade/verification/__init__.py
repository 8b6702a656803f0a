"""Is our model the one whose weights it has? Ours and the reference code, side by side on the same pictures."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones import build_backbone
from saccade.backbones.base import Row
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.models import build_network, read_row
from saccade.models.detector import Detector, DetectorRow
from saccade.verification.certificate import FORMAT, compare_recorded, read_certificate, record
from saccade.verification.choices import Choices
from saccade.verification.compare import (
    DTYPES,
    TOLERANCES,
    Comparison,
    Judge,
    Network,
    Outcome,
    compare,
    cross_entropy,
    functional,
    load_reference,
    run_ours,
    run_theirs,
)
from saccade.verification.detection import judge_ours, judge_theirs, made_up_counts, made_up_targets
from saccade.verification.pictures import Pictures, choose_pictures, read_shape
from saccade.verification.report import Verification
from saccade.weights.fingerprint import hash_tensors
from saccade.weights.formats import FORMATS
from saccade.weights.formats.table import DetectorPeer, Format, Rule, State, read_state, write_state
from saccade.weights.load import is_ours, load_weights

__all__ = ["Verification", "verify"]


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

    @property
    def rules(self) -> list[Rule]:
        return self.format.rules(self.row, self.classes)

    def network(self, dtype: str) -> Network | Detector:
        """Ours. Where a rule computes (such as a sum of two tensors) and float32 rounded it, float64 is not rounded."""
        wide = {name: value.double() if value.is_floating_point() else value for name, value in self.theirs.items()}
        exact = read_state(wide, self.rules, self.format.ignored, self.source)
        weights = {
            name: exact[name] if torch.equal(exact[name].to(value.dtype), value) else value
            for name, value in self.ours.items()
        }
        if isinstance(self.row, DetectorRow):
            network = build_network(self.row, self.classes)
            assert isinstance(network, Detector)
        else:
            network = Network(build_backbone(self.row), self.classes)
        network.to(DTYPES[dtype]).load_state_dict(weights)
        return network.eval()

    def reference(self) -> nn.Module:
        assert self.format.peer is not None
        model = self.format.peer.build(self.row, self.classes, self.config)
        patterns = self.format.ignored
        return load_reference(
            model, self.theirs, lambda name: any(fnmatchcase(name, pattern) for pattern in patterns), self.source
        )


def verify(
    source: str | Path,
    *,
    data: str | Path | None = None,
    image_size: str | None = None,
    dtype: str = "both",
    certificate: str | Path | None = None,
    model: str | None = None,
    branch: str | None = None,
) -> Verification:
    """Compare our model of these weights with the reference code, or with what a certificate recorded of it.

    `source` is a name on a hub, a folder in the hub's layout, or a file. The pictures are those of the folder `data`,
    or two photographs that come with scikit-learn; `image_size` is `224` or `224x160` (height first). `model` names
    the architecture where a bare file leaves it open, `branch` the part of a checkpoint.
    """
    if dtype not in ("both", *DTYPES):
        raise UserError(f"--dtype {dtype}: not known; use both, {' or '.join(DTYPES)}")
    dtypes = list(DTYPES) if dtype == "both" else [dtype]
    subject = open_subject(str(source), model, branch)
    if certificate is not None:
        return verify_recorded(subject, certificate, data, image_size, dtypes)
    peer = needed_peer(subject)
    shape = read_shape(image_size or str(subject.row.image_size), subject.row.stride)
    pictures = choose_pictures(data, shape, subject.preprocessing)
    reference = subject.reference()
    comparisons: dict[str, Comparison] = {}
    recorded: dict[str, Any] = {}
    for name in dtypes:
        choices = Choices(TOLERANCES[name].logits)
        with choices.noted():
            ours = _ours(subject, pictures, name)
        with choices.repeated():
            theirs = _theirs(subject, reference, pictures, name, list(ours.gradients))
        comparisons[name] = compare(ours, theirs, _stage_names(subject), TOLERANCES[name])
        if (answers := record(theirs)) is not None:
            recorded[name] = answers
        del ours, theirs
    versions = {peer: importlib.metadata.version(peer)}
    facts = describe(subject, pictures, versions)
    return Verification(f"{peer} {versions[peer]}", facts, comparisons, recorded)


def verify_recorded(
    subject: Subject, certificate: str | Path, data: str | Path | None, image_size: str | None, dtypes: list[str]
) -> Verification:
    """Without the reference code: our answers beside its recorded ones."""
    recorded = read_certificate(certificate)
    missing = [name for name in dtypes if name not in recorded["recorded"]]
    if missing:
        raise UserError(f"--certificate {certificate}: records nothing in {', '.join(missing)}; choose another --dtype")
    kept = recorded["pictures"]
    shape = read_shape(image_size or f"{kept['height']}x{kept['width']}", subject.row.stride)
    pictures = choose_pictures(data, shape, subject.preprocessing)
    if pictures.sha256 != kept["sha256"]:
        raise UserError(
            f"--certificate {certificate}: was made with other pictures ({kept['count']} of {kept['origin']}, "
            f"{kept['height']} x {kept['width']}); give those by --data, and no other --image-size"
        )
    facts = {**describe(subject, pictures, {}), "compared_with": recorded["versions"]}
    faults = [
        f"{what} {'is' if what != 'weights' else 'are'} not what was certified"
        for what, same in (
            ("weights", facts["weights"]["sha256"] == recorded["weights"]["sha256"]),
            ("architecture", facts["architecture"] == recorded["architecture"]),
        )
        if not same
    ]
    comparisons = {
        name: compare_recorded(
            _ours(subject, pictures, name),
            recorded["recorded"][name],
            _stage_names(subject),
            TOLERANCES[name],
        )
        for name in dtypes
    }
    others = {name: version for name, version in recorded["versions"].items() if name not in ("saccade", "torch")}
    named = ", ".join(f"{name} {version}" for name, version in others.items())
    reference = f"what {named} answered when {Path(certificate).name} was written"
    return Verification(reference, facts, comparisons, recorded["recorded"], tuple(faults))


def open_subject(source: str, model: str | None = None, branch: str | None = None) -> Subject:
    """Weights from wherever they are. Those of saccade itself are written in a dialect that has a reference."""
    if is_ours(Path(source)):
        loaded = load_weights(source)
        row, classes = read_row(loaded.card.architecture, loaded.where), len(loaded.card.class_names)
        written = _write_for_reference(row, classes, loaded.weights)
        if written is None:
            raise UserError(f"{source}: no reference code is known for such a model ({row.family}, {row.about})")
        form, theirs = written
        config = form.write_config(row, classes)
        preprocessing = loaded.card.preprocessing
        return Subject(source, form, row, classes, config, loaded.weights, theirs, preprocessing, written=True)
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
    )


def _write_for_reference(row: Row, classes: int, ours: State) -> tuple[Format, dict[str, Tensor]] | None:
    """Our weights in the first dialect that has reference code and can express this model."""
    for form in FORMATS:
        if form.family == row.family and form.peer is not None:
            try:
                form.write_config(row, classes)
                return form, write_state(ours, form.rules(row, classes))
            # a row that this dialect has no words for
            except (UserError, KeyError, ValueError, AssertionError, NotImplementedError):
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


def _stage_names(subject: Subject) -> list[str]:
    return [stage.name for stage in subject.format.stages(subject.row)]


def _ours(subject: Subject, pictures: Pictures, dtype: str) -> Outcome:
    images = pictures.normalised(subject.preprocessing, DTYPES[dtype])
    network, stages, judge = subject.network(dtype), subject.format.stages(subject.row), _judge(subject)
    if isinstance(network, Detector):
        assert isinstance(subject.row, DetectorRow)
        judge = judge_ours(subject.row, made_up_targets(len(images), subject.classes, images.dtype))
        return run_ours(network, lambda x: network.with_maps(x)[0].logits, images, stages, judge)
    return run_ours(network, network.predict, images, stages, judge)


def _judge(subject: Subject) -> Judge:
    return cross_entropy if subject.classes else functional


def _theirs(
    subject: Subject, reference: nn.Module, pictures: Pictures, dtype: str, parameters: Sequence[str]
) -> Outcome:
    peer = subject.format.peer
    assert peer is not None
    images = pictures.normalised(subject.preprocessing, DTYPES[dtype])
    stages = subject.format.stages(subject.row)
    call, judge = peer.logits, _judge(subject)
    if isinstance(peer, DetectorPeer):
        targets = made_up_targets(len(images), subject.classes, images.dtype)
        call, judge = peer.outputs, judge_theirs(reference, peer, targets)
    return run_theirs(reference.to(DTYPES[dtype]), call, images, stages, judge, subject.rules, parameters)


def describe(subject: Subject, pictures: Pictures, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What a certificate says beside its figures."""
    from saccade import __version__

    height, width = pictures.shape
    things = made_up_counts(len(pictures.pixels)) if isinstance(subject.row, DetectorRow) else []
    made_up = [f"made-up things in the pictures: {', '.join(map(str, things))}"] if things else []
    return {
        "certificate": FORMAT,
        "source": subject.source,
        "dialect": subject.format.dialect,
        "reference_weights": "written from ours" if subject.written else "those of the source",
        "family": subject.format.family,
        "about": subject.row.about,
        "architecture": subject.row.to_dict(),
        "classes": subject.classes,
        "mode": "eval",
        "notes": [*subject.notes, *made_up],
        "versions": {**versions, "saccade": __version__, "torch": torch.__version__},
        "weights": {"sha256": hash_tensors(subject.theirs), "tensors": len(subject.theirs)},
        "pictures": {
            "sha256": pictures.sha256,
            "count": len(pictures.pixels),
            "height": height,
            "width": width,
            "origin": pictures.origin,
        },
    }

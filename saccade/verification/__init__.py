"""Is our model the one whose weights it has? Ours and the reference code, side by side on the same input."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saccade.errors import UserError
from saccade.models.detector import Detector, DetectorRow
from saccade.models.translator import Translator, TranslatorRow
from saccade.verification.certificate import FORMAT, compare_recorded, read_certificate, record, refuse_other_file
from saccade.verification.choices import Choices
from saccade.verification.compare import (
    DTYPES,
    TOLERANCES,
    Comparison,
    Judge,
    Outcome,
    compare,
    cross_entropy,
    functional,
    run_ours,
    run_theirs,
)
from saccade.verification.detection import judge_ours, judge_theirs, made_up_counts, made_up_targets, settled
from saccade.verification.pictures import Pictures, choose_pictures, read_shape
from saccade.verification.report import Verification, size_of
from saccade.verification.subject import Subject, needed_peer, open_subject
from saccade.verification.texts import Texts, ask_ours, ask_theirs, choose_texts
from saccade.weights.fingerprint import hash_tensors
from saccade.weights.formats.table import DetectorPeer, Peer, TranslatorPeer

__all__ = ["Subject", "Verification", "refuse_other_file", "verify"]


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
    or two photographs that come with scikit-learn; `image_size` is `224` or `224x160` (height first). A model of texts
    is given the lines of the file `data`, or texts with their translations, or sentences of ours. `model` names the
    architecture where a bare file leaves it open, `branch` the part of a checkpoint.
    """
    if dtype not in ("both", *DTYPES):
        raise UserError(f"--dtype {dtype}: not known; use both, {' or '.join(DTYPES)}")
    dtypes = list(DTYPES) if dtype == "both" else [dtype]
    subject = open_subject(str(source), model, branch)
    if certificate is not None:
        return verify_recorded(subject, certificate, data, image_size, dtypes)
    peer = needed_peer(subject)
    shown = _choose(subject, data, image_size)
    reference = subject.reference()
    comparisons: dict[str, Comparison] = {}
    recorded: dict[str, Any] = {}
    for name in dtypes:
        choices = Choices(TOLERANCES[name].logits)
        with choices.noted():
            ours = _ours(subject, shown, name)
        with choices.repeated():
            theirs = _theirs(subject, reference, shown, name, list(ours.gradients))
        comparisons[name] = compare(ours, theirs, _stage_names(subject), TOLERANCES[name])
        if (answers := record(theirs)) is not None:
            recorded[name] = answers
        del ours, theirs
    versions = {peer: importlib.metadata.version(peer)}
    facts = describe(subject, shown, versions)
    return Verification(f"{peer} {versions[peer]}", facts, settled(comparisons), recorded)


def verify_recorded(
    subject: Subject, certificate: str | Path, data: str | Path | None, image_size: str | None, dtypes: list[str]
) -> Verification:
    """Without the reference code: our answers beside its recorded ones."""
    recorded = read_certificate(certificate)
    missing = [name for name in dtypes if name not in recorded["recorded"]]
    if missing:
        raise UserError(f"--certificate {certificate}: records nothing in {', '.join(missing)}; choose another --dtype")
    kind = _kind(subject)
    if kind not in recorded:
        raise UserError(f"--certificate {certificate}: was not made with {kind}, which {subject.source} is a model of")
    kept = recorded[kind]
    if image_size is None and kind == "pictures":
        image_size = f"{kept['height']}x{kept['width']}"
    shown = _choose(subject, data, image_size)
    if shown.sha256 != kept["sha256"]:
        also = ", and no other --image-size" if kind == "pictures" else ""
        raise UserError(
            f"--certificate {certificate}: was made with other {kind} ({kept['count']} of {kept['origin']}, "
            f"{size_of(kept)}); give those by --data{also}"
        )
    facts = {**describe(subject, shown, {}), "compared_with": recorded["versions"]}
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
            _ours(subject, shown, name),
            recorded["recorded"][name],
            _stage_names(subject),
            TOLERANCES[name],
        )
        for name in dtypes
    }
    others = {name: version for name, version in recorded["versions"].items() if name not in ("saccade", "torch")}
    named = ", ".join(f"{name} {version}" for name, version in others.items())
    reference = f"what {named} answered when {Path(certificate).name} was written"
    return Verification(reference, facts, settled(comparisons), recorded["recorded"], tuple(faults))


def _kind(subject: Subject) -> str:
    return "texts" if isinstance(subject.row, TranslatorRow) else "pictures"


def _choose(subject: Subject, data: str | Path | None, image_size: str | None) -> Pictures | Texts:
    """What both sides are shown."""
    if isinstance(subject.row, TranslatorRow):
        if image_size is not None:
            raise UserError(f"--image-size {image_size}: is for pictures, and {subject.source} is a model of texts")
        return choose_texts(data, subject.tokenizer, subject.row, subject.source)
    row = subject.row
    # some models are described by the size of crops in training, which is no multiple: a ResNet-50 of 176 pixels
    own = max(1, round(row.image_size / row.stride)) * row.stride
    return choose_pictures(data, read_shape(image_size or str(own), row.stride), subject.preprocessing)


def _stage_names(subject: Subject) -> list[str]:
    return [stage.name for stage in subject.format.stages(subject.row)]


def _ours(subject: Subject, shown: Pictures | Texts, dtype: str) -> Outcome:
    network, stages, judge = subject.network(dtype), subject.format.stages(subject.row), _judge(subject)
    if isinstance(shown, Texts):
        assert isinstance(network, Translator)
        return ask_ours(network, shown, stages)
    assert not isinstance(network, Translator)
    images = shown.normalised(subject.preprocessing, DTYPES[dtype])
    if isinstance(network, Detector):
        assert isinstance(subject.row, DetectorRow)
        judge = judge_ours(subject.row, made_up_targets(len(images), subject.classes, images.dtype))
        return run_ours(network, network, lambda x: network.with_maps(x)[0].logits, images, stages, judge)
    return run_ours(network, network, network.predict, images, stages, judge)


def _judge(subject: Subject) -> Judge:
    return cross_entropy if subject.classes else functional


def _theirs(
    subject: Subject, reference: nn.Module, shown: Pictures | Texts, dtype: str, parameters: Sequence[str]
) -> Outcome:
    peer, stages, rules = subject.format.peer, subject.format.stages(subject.row), subject.rules
    reference = reference.to(DTYPES[dtype])
    if isinstance(shown, Texts):
        assert isinstance(peer, TranslatorPeer) and isinstance(subject.row, TranslatorRow)
        assert subject.tokenizer is not None
        return ask_theirs(reference, peer, shown, subject.row, subject.tokenizer, stages, rules, parameters)
    assert isinstance(peer, Peer)
    images = shown.normalised(subject.preprocessing, DTYPES[dtype])
    call, judge = peer.logits, _judge(subject)
    if isinstance(peer, DetectorPeer):
        targets = made_up_targets(len(images), subject.classes, images.dtype)
        call, judge = peer.outputs, judge_theirs(reference, peer, targets)
    try:
        return run_theirs(reference, call, images, stages, judge, rules, parameters)
    except (RuntimeError, ValueError, AssertionError) as error:
        (H, W), usual, said = images.shape[-2:], subject.row.image_size, str(error) or type(error).__name__
        if (usual, usual) == (H, W):
            raise
        raise UserError(
            f"{subject.source}: the reference code takes no pictures of {H}x{W} ({said.splitlines()[0]}); "
            f"give --image-size {usual}"
        ) from error


def describe(subject: Subject, shown: Pictures | Texts, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What a certificate says beside its figures."""
    from saccade import __version__

    things = made_up_counts(shown.facts["count"]) if isinstance(subject.row, DetectorRow) else []
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
        _kind(subject): shown.facts,
    }

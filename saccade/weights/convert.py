"""Weights of other libraries as ours. They are recognised, renamed and checked; nothing is skipped in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saccade import __version__
from saccade.backbones.base import Row
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.models import build_network, model_row, name_of, task_of
from saccade.models.detector import DetectorRow
from saccade.models.translator import STEERING, TranslatorRow
from saccade.tokenizer import LearntTokenizer, MarianTokenizer, Tokenizer, read_tokenizer
from saccade.weights import recognition
from saccade.weights.descriptions import read_class_names, read_preprocessing
from saccade.weights.formats.table import Format, Rule, Shapes, read_state
from saccade.weights.model_file import ModelCard, check_weights
from saccade.weights.published import PUBLISHED, Published
from saccade.weights.source import UNKNOWN_LICENCE, RawWeights
from saccade.weights.unwrap import shortened

T = TypeVar("T")
WIDEST = 100_000  # of any figure of an architecture; larger ones come from damaged or hostile descriptions
MOST_MISSING = 0.1  # of a tokenizer's pieces; a few may be left out of the list of tokens on purpose
# Words in the names of figures that count parts, each of which has tensors of its own.
REPEATED = ("depth", "layers", "blocks", "repeats", "groups", "levels", "summaries")


@dataclass(frozen=True)
class Imported:
    """Weights under our names, and all that is known of them. `theirs` are the same under their own names."""

    row: Row
    classes: int
    weights: dict[str, Tensor]
    theirs: Mapping[str, Tensor]
    class_names: tuple[str, ...]
    preprocessing: PreprocessingConfig
    notes: tuple[str, ...]  # beside those of the RawWeights
    licence: str
    training_data: str
    provenance: str
    format: Format
    tokenizer: str | None = None
    languages: tuple[str, str] | None = None

    def card(self) -> ModelCard:
        """The description for a model file."""
        return ModelCard(
            task=task_of(self.row) if self.class_names or self.tokenizer is not None else "embed",
            model=name_of(self.row),
            architecture=self.row.to_dict(),
            class_names=self.class_names,
            preprocessing=self.preprocessing,
            tokenizer=self.tokenizer,
            languages=self.languages,
            training_data=self.training_data,
            licence=self.licence,
            provenance=self.provenance,
            library_version=__version__,
        )


def recognise(raw: RawWeights) -> Format:
    """The family and dialect of these weights, or a UserError that says what they look like."""
    return recognition.recognise(raw.where, shapes_of(raw.tensors), raw.config)


def import_weights(raw: RawWeights, *, model: str | None = None, keep_head: bool = True) -> Imported:
    """Rename and check. `model` is a name of our table, where the source leaves the architecture open."""
    form = recognise(raw)
    if (complete := form.complete) is not None:
        raw = replace(raw, tensors=dict(_ask(raw.where, form, lambda: complete(raw.tensors, raw.config))))
    shapes = shapes_of(raw.tensors)
    notes: list[str] = []
    row = _row(raw, form, shapes, model, notes)
    refuse_absurd(raw.where, row, len(shapes))
    classes = _ask(raw.where, form, lambda: form.classes(shapes, raw.config))
    rules = _ask(raw.where, form, lambda: form.rules(row, classes))
    network = describe_network(raw.where, row, classes)
    weights = read_state(raw.tensors, rules, form.ignored, raw.where)
    check_weights(weights, network.state_dict(), raw.where)
    _refuse_non_finite(raw, rules)
    aside = [key for key in raw.tensors if any(fnmatchcase(key, pattern) for pattern in form.ignored)]
    aside = sorted(set(aside) - {name for rule in rules for name in rule.theirs})
    if aside:
        notes.append(f"left aside, being of no use here: {shortened(aside)}")
    if not keep_head and isinstance(row, DetectorRow):
        raise UserError(f"{raw.where}: a detector ({form.name}), which is nothing without its head; keep it")
    if classes and not keep_head:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        notes.append(f"the head for {classes} classes is left out, as asked")
        classes = 0
    known = next((each for every in PUBLISHED.values() for each in every if each.name == raw.where), None)
    tokenizer, languages, found = None, None, []
    if isinstance(row, TranslatorRow):
        assert form.tokenizer is not None
        tokenizer, preprocessing = form.tokenizer(raw.tokenizer, raw.where), PreprocessingConfig()
        check_tokenizer(row, read_tokenizer(tokenizer, raw.where), raw.where)
        languages = _languages(raw)
    else:
        preprocessing, found = read_preprocessing(raw.where, raw.config, raw.preprocessor, row, form.usual(row))
    class_names, more = read_class_names(raw.config, classes, _is_imagenet(raw, form, known), task_of(row))
    unknown = raw.licence == UNKNOWN_LICENCE
    return Imported(
        row,
        classes,
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()},
        raw.tensors,
        class_names,
        preprocessing,
        (*notes, *found, *more),
        known.licence if known and unknown else raw.licence,
        raw.training_data or (known.training_data if known else ""),
        f"{raw.origin}; read as {form.name} by saccade {__version__}",
        form,
        tokenizer,
        languages,
    )


def check_tokenizer(row: TranslatorRow, tokenizer: Tokenizer, where: str) -> None:
    """Is it the one whose numbers the weights know?"""
    learnt = isinstance(tokenizer, LearntTokenizer)  # then the weights know no tokens beyond it
    if tokenizer.size > row.vocabulary or (learnt and tokenizer.size < row.vocabulary):
        raise UserError(
            f"{where}: its tokenizer has {tokenizer.size} tokens, its weights know {row.vocabulary}; they are not of "
            "one model"
        )
    theirs = {"padding": (tokenizer.pad, row.pad), "end": (tokenizer.end, row.end)}
    if learnt:  # Marian's begin as the weights say
        theirs["start"] = tokenizer.start, row.begin
    wrong = [f"{name} is {a} to the tokenizer and {b} to the weights" for name, (a, b) in theirs.items() if a != b]
    if wrong:
        raise UserError(f"{where}: tokenizer and weights are not of one model: {'; '.join(wrong)}")
    for name, share in tokenizer.missing().items() if isinstance(tokenizer, MarianTokenizer) else ():
        if share > MOST_MISSING:
            raise UserError(
                f"{where}: {share:.0%} of the pieces of {name} are not in vocab.json; they are not of one model, get "
                "all of them anew"
            )


def _languages(raw: RawWeights) -> tuple[str, str] | None:
    """From and into, where what lies beside the weights says so."""
    try:
        said = json.loads(raw.tokenizer.get("tokenizer_config.json", b"{}"))
        of, into = said.get("source_lang"), said.get("target_lang")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{raw.where}: tokenizer_config.json is damaged; get it anew, or remove it") from None
    return (of, into) if of and into and isinstance(of, str) and isinstance(into, str) else None


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def describe_network(where: str, row: Row, classes: int) -> nn.Module:
    """The network on the meta device, for its shapes; it takes no memory."""
    try:
        with torch.device("meta"):
            return build_network(row, classes)
    except recognition.ODD as error:
        raise UserError(f"{where}: describes a model that cannot be built ({error})") from None


def _row(raw: RawWeights, form: Format, shapes: Shapes, model: str | None, notes: list[str]) -> Row:
    if model is None:
        row = _ask(raw.where, form, lambda: form.row(shapes, raw.config))
        row = _told(raw, form, row)
        if not raw.config:
            notes.append(f"no config.json: the form is read from the shapes ({row.about}); --model NAME says otherwise")
        return row
    row = model_row(model)
    if row.family != form.family:
        raise UserError(f"--model {model}: of the family {row.family!r}, but {raw.where} holds a {form.name}")
    try:
        read = form.row(shapes, raw.config)
    except recognition.ODD:  # the name says what they leave open
        read = None
    if (meant := form.meant) is not None:
        named, described = row, bool(raw.config)
        row = _ask(raw.where, form, lambda: meant(named, read or named, described))
    elif read is not None:
        row = replace(row, image_size=read.image_size)
    return _told(raw, form, row)


def _told(raw: RawWeights, form: Format, row: Row) -> Row:
    told = form.told
    return row if told is None else _ask(raw.where, form, lambda: told(row, raw.tensors))


def _ask(where: str, form: Format, question: Callable[[], T]) -> T:
    """What a format says; a description that it stumbles over is the file's fault, whatever the exception."""
    try:
        return question()
    except UserError as error:
        raise UserError(str(error) if where in str(error) else f"{where}: {error}") from None
    except recognition.ODD as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: recognised as {form.name}, but its description is incomplete ({what})") from None


def refuse_absurd(where: str, row: Row, tensors: int) -> None:
    """Before anything is built: no figure beyond reason, and no more blocks than there are tensors."""
    described = asdict(row)
    inner = described.pop("backbone", None)  # of a detector
    for name, value in [*described.items(), *(inner.items() if isinstance(inner, dict) else ())]:
        figures = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int | float)]
        counts = any(word in name for word in REPEATED)
        most = tensors if counts else WIDEST
        if name in STEERING:  # of these only the tokens' table can say
            continue
        if any(not abs(figure) <= most for figure in figures) or (counts and sum(figures) > most):
            said = f"{name} = {str(value):.80}"
            raise UserError(f"{where}: claims {said}, which these {tensors} tensors cannot be; damaged")
        if len(figures) > tensors:
            raise UserError(f"{where}: claims {len(figures)} {name}, which these {tensors} tensors cannot be; damaged")


def _refuse_non_finite(raw: RawWeights, rules: list[Rule]) -> None:
    used = sorted({name for rule in rules for name in rule.theirs if name in raw.tensors})
    bad = [name for name in used if not torch.isfinite(raw.tensors[name]).all()]
    if bad:
        raise UserError(
            f"{raw.where}: {len(bad)} of {len(used)} tensors hold NaN or infinity ({shortened(bad)}); the training "
            "that made them diverged, or the file is damaged"
        )


def _is_imagenet(raw: RawWeights, form: Format, known: Published | None) -> bool:
    """Does anything say that the classes are those of ImageNet-1k? torchvision publishes no others."""
    described = raw.config.get("pretrained_cfg", raw.config)
    tag: Any = described.get("tag") if isinstance(described, Mapping) else None
    said = f"{raw.where} {raw.training_data} {tag} {known.training_data if known else ''}"
    return form.dialect == "torchvision" or bool(re.search(r"in1k|imagenet-?1k|ILSVRC", said, re.IGNORECASE))

"""Our weights for others: a folder that timm or transformers loads strictly."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as serialise
from torch import Tensor

from saccade.backbones.base import Row
from saccade.backbones.vit import ViTConfig
from saccade.config import NetworkConfig
from saccade.errors import UserError
from saccade.models import read_row
from saccade.models.translator import TranslatorRow
from saccade.tokenizer import MarianTokenizer, read_tokenizer
from saccade.weights.convert import describe_network, import_weights
from saccade.weights.descriptions import bounds, write_preprocessor, write_pretrained_cfg
from saccade.weights.formats import FORMATS
from saccade.weights.formats.table import Format, NoWords, write_state
from saccade.weights.load import is_ours, load_weights
from saccade.weights.model_file import (
    ModelCard,
    check_weights,
    read_metadata,
    refuse_existing,
    save_model,
    sync_folder,
)
from saccade.weights.source import open_weights
from saccade.words import with_article

DIALECTS = {"timm": "timm", "hf": "huggingface"}  # as the command calls them
# Model types of transformers that demand a mask token, and its dimensions. It serves training without labels, so ours
# have none; zeros are what it begins with there.
MASK_TOKENS = {"dinov2": 2, "dinov2_with_registers": 2, "dinov3_vit": 3}


@dataclass(frozen=True)
class Conversion:
    """What was read and what was written."""

    source: str
    out: str
    read_as: str
    written_as: str
    model: str
    family: str
    about: str
    parameters: int
    classes: int
    image_size: int
    vocabulary: int  # of a model of texts, 0 of others; so is the next
    longest_text: int  # in tokens
    languages: tuple[str, str] | None  # from, into
    licence: str
    training_data: str
    provenance: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        count = self.parameters
        size = f"{count / 1e6:.1f} M parameters" if count >= 1e5 else f"{count:,} parameters"
        if self.vocabulary:
            direction = [f"from {self.languages[0]} into {self.languages[1]}"] if self.languages else []
            more = [f"{self.vocabulary} tokens", *direction, f"texts of at most {self.longest_text} tokens"]
        else:
            head = f"{self.classes} classes" if self.classes else "no head"
            more = [head, f"{self.image_size}x{self.image_size} pixels"]
        return [
            f"{self.model}: {', '.join((self.family, self.about, size, *more))}",
            f"read as:  {self.read_as}",
            f"licence:  {self.licence}",
            *([f"data:     {self.training_data}"] if self.training_data else []),
            f"from:     {self.provenance}",
            *(f"note:     {note}" for note in self.notes),
            f"written:  {self.out}" + ("" if self.written_as == "saccade" else f" (for {self.written_as})"),
        ]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "saccade",
    model: str | None = None,
    keep_head: bool = True,
    branch: str | None = None,
    merge_tokens: int | None = None,
    merge_schedule: str | None = None,
) -> Conversion:
    """Read weights from anywhere and write a model file, or a folder for timm (`timm`) or transformers (`hf`).

    A ViT can be told to merge so many tokens in each block (ToMe), or none (0), without learning anew: faster, and a
    little less right. The other libraries have no merging. Nothing is ever written over, and `out` appears whole or
    not at all.
    """
    out = Path(out)
    _check_out(out, to)
    if merge_tokens is None and merge_schedule is not None:
        raise UserError(f"--merge-schedule {merge_schedule}: of how many tokens? Give --merge-tokens, too")
    if merge_tokens is not None and to != "saccade":
        raise UserError(f"--merge-tokens {merge_tokens}: --to {to} has no merging of tokens; leave one of them out")
    if _is_ours(Path(source)):
        if model is not None or branch is not None:
            raise UserError(f"{source}: a model of saccade, which says what it is; leave --model and --branch out")
        loaded = load_weights(source)
        weights, card, notes, read_as = loaded.weights, loaded.card, loaded.notes, "saccade"
        if not keep_head and card.task == "detect":
            raise UserError(f"{source}: a detector, which is nothing without its head; keep it")
        if not keep_head and card.class_names:
            weights, card, notes = _without_head(weights, card, notes)
    else:
        raw = open_weights(source, branch=branch)
        found = import_weights(raw, model=model, keep_head=keep_head)
        weights, card, notes, read_as = found.weights, found.card(), [*raw.notes, *found.notes], found.format.name
    row = read_row(card.architecture, str(source))
    if merge_tokens is not None:
        changed = _merging(row, merge_tokens, merge_schedule or "constant", f"{source}: {with_article(card.model)}")
        if changed != row and card.metrics:
            notes = [*notes, "its figures are left out, being of other merging"]
            card = replace(card, metrics={})
        row, card = changed, replace(card, architecture=changed.to_dict())
    elif to != "saccade" and getattr(row, "merge_tokens", 0):
        notes = [*notes, "merging of tokens is left out, which the other library has not; its answers will differ"]
    network = describe_network(str(source), row, len(card.class_names))
    check_weights(weights, network.state_dict(), str(source))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent}: cannot be made ({error.strerror or error})") from None
    if to == "saccade":
        save_model(out, weights, card, new=True)
    else:
        files = export_weights(card, weights, DIALECTS[to], str(source))
        notes = [*notes, *_about_sizes(files, card)]
        write_folder(out, files)
    text = isinstance(row, TranslatorRow)
    return Conversion(
        source=str(source),
        out=str(out),
        read_as=read_as,
        written_as=to,
        model=card.model,
        family=row.family,
        about=row.about,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        classes=len(card.class_names),
        image_size=0 if text else card.preprocessing.image_size,
        vocabulary=row.vocabulary if text else 0,
        longest_text=row.max_length if text else 0,
        languages=card.languages,
        licence=card.licence,
        training_data=card.training_data,
        provenance=card.provenance,
        notes=tuple(notes),
    )


def _merging(row: Row, tokens: int, schedule: str, what: str) -> Row:
    if not isinstance(row, ViTConfig):
        raise UserError(f"{what}, which merges no tokens; --merge-tokens is for classifiers and embedders of a ViT")
    most = min(256, row.side**2 - 1)
    if not 0 <= tokens <= most:
        raise UserError(f"--merge-tokens {tokens}: give 0 for none, or up to {most}; usual are 5 to 20")
    try:
        merge_schedule = NetworkConfig.model_validate({"merge_schedule": schedule}).merge_schedule
    except ValidationError:
        raise UserError(f"--merge-schedule {schedule}: not known; use constant or decreasing") from None
    return row.changed(NetworkConfig(merge_tokens=tokens, merge_schedule=merge_schedule))


def _about_sizes(files: Mapping[str, bytes], card: ModelCard) -> list[str]:
    """Where the other library bounds the sides of a picture: what is written for our number of pixels."""
    size = json.loads(files.get("preprocessor_config.json", b"{}")).get("size", {})
    if "longest_edge" not in size:
        return []
    said = bounds(size["shortest_edge"], size["longest_edge"])
    return [f"written for {said}; image_size {card.preprocessing.image_size} here: as many pixels for one of 4:3"]


def _is_ours(path: Path) -> bool:
    """A file that cannot be read at all is left to `open_weights`, which says more about what it may be."""
    file = path / "model.safetensors" if path.is_dir() else path
    return is_ours(path) and (not file.is_file() or read_metadata(file) is not None)


def _check_out(out: Path, to: str) -> None:
    """Before anything is read, which may take long."""
    if to not in ("saccade", *DIALECTS):
        raise UserError(f"--to {to}: not known; use saccade, timm or hf")
    refuse_existing(out)
    if to == "saccade" and out.suffix != ".safetensors":
        raise UserError(f"{out}: a model file is named *.safetensors, such as {out.name or 'model'}.safetensors")
    if to != "saccade" and out.suffix in (".safetensors", ".bin", ".pth"):
        raise UserError(f"{out}: --to {to} writes a folder (weights, config.json and more); give a name without suffix")


def _without_head(
    weights: dict[str, Tensor], card: ModelCard, notes: list[str]
) -> tuple[dict[str, Tensor], ModelCard, list[str]]:
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    values = {**card.to_dict(), "task": "embed", "class_names": ()}
    said = f"the head for {len(card.class_names)} classes is left out, as asked"
    return kept, ModelCard.from_dict(values, "the model"), [*notes, said]


# --- to others -------------------------------------------------------------------------------------------------------


def export_weights(card: ModelCard, weights: Mapping[str, Tensor], dialect: str, where: str = "") -> dict[str, bytes]:
    """The files of a folder in the hub's layout, by name."""
    row, classes = read_row(card.architecture, where or card.model), len(card.class_names)
    others = [flag for flag, each in DIALECTS.items() if each != dialect and _has_words(card, row, each)]
    form, config, theirs = _write(row, classes, weights, dialect, where or card.model, others)
    theirs |= _mask_token(theirs, config)
    files = {
        "model.safetensors": serialise(theirs, {"format": "pt"}),
        "config.json": _json(_described(config, card, dialect)),
        "README.md": _readme(card).encode(),
    }
    if card.tokenizer is not None:
        assert isinstance(row, TranslatorRow)
        files |= tokenizer_files(card.tokenizer, where or card.model)
        files |= {name: _json(values) for name, values in _translating(row, card.languages).items()}
    elif dialect == "huggingface":
        files["preprocessor_config.json"] = _json(write_preprocessor(card.preprocessing, form.processor))
    return files


def tokenizer_files(text: str, where: str = "the model") -> dict[str, bytes]:
    """Of a model of texts, as Marian's are laid out; the only ones that another library has."""
    tokenizer = read_tokenizer(text, where)
    if not isinstance(tokenizer, MarianTokenizer):
        raise UserError(f"{where}: transformers reads Marian's tokens alone, and this model has learnt its own")
    source, target = tokenizer.models
    return {"source.spm": source, "target.spm": target, "vocab.json": json.dumps(tokenizer.vocabulary).encode()}


def _translating(row: TranslatorRow, languages: tuple[str, str] | None) -> dict[str, dict[str, Any]]:
    """What transformers' tokenizer and `generate` are to know, so that they find what four beams find here."""
    named = dict(zip(("source_lang", "target_lang"), languages, strict=True)) if languages else {}
    tokens = {"tokenizer_class": "MarianTokenizer", "model_max_length": row.max_length, "separate_vocabs": False}
    search = {
        "num_beams": 4,
        "max_length": row.max_length,
        "decoder_start_token_id": row.begin,
        "eos_token_id": row.end,
        "forced_eos_token_id": row.end,
        "pad_token_id": row.pad,
        "bad_words_ids": [[row.pad]],
        "renormalize_logits": True,
    }
    return {"tokenizer_config.json": {**tokens, **named}, "generation_config.json": search}


def _has_words(card: ModelCard, row: Row, dialect: str) -> bool:
    """Can a model be written for these others?"""
    classes = len(card.class_names)
    if card.tokenizer is not None and not isinstance(read_tokenizer(card.tokenizer, card.model), MarianTokenizer):
        return False
    for form in FORMATS:
        if (form.family, form.dialect) == (row.family, dialect):
            with suppress(NoWords):
                form.write_config(row, classes)
                form.rules(row, classes)
                return True
    return False


def _mask_token(theirs: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    dimensions = MASK_TOKENS.get(str(config.get("model_type")))
    beside = next((name for name in theirs if name.endswith("embeddings.cls_token")), None)
    if dimensions is None or beside is None:
        return {}
    width = theirs[beside].shape[-1]
    return {beside.replace("cls_token", "mask_token"): torch.zeros((1,) * (dimensions - 1) + (width,))}


def _write(
    row: Row, classes: int, weights: Mapping[str, Tensor], dialect: str, where: str, others: list[str]
) -> tuple[Format, dict[str, Any], dict[str, Tensor]]:
    """The first format of the dialect that has words for the model, its config.json and the weights in it.

    `others`: values of --to that can write it where this one cannot.
    """
    family = row.family
    found = [each for each in FORMATS if each.family == family and each.dialect == dialect]
    if not found:
        instead = f"; --to {others[0]} can" if others else ""
        raise UserError(f"{where}: a {family} cannot be written for {dialect}, which has no such model{instead}")
    reasons: list[str] = []
    for form in found:
        try:
            config = form.write_config(row, classes)
            return form, config, write_state(weights, form.rules(row, classes))
        except NoWords as error:
            reasons.append(str(error))
    raise UserError(
        f"{where}: cannot be written as {found[0].name}: {'; '.join(dict.fromkeys(reasons))}; "
        "only forms that the other library has can be written for it"
    )


def _described(config: dict[str, Any], card: ModelCard, dialect: str) -> dict[str, Any]:
    """Their config.json, with what ours says of classes and pictures."""
    classes = card.class_names
    if dialect == "timm":
        outputs = config.get("num_classes", len(classes))  # CLIP's projection is a head without classes to timm
        given = write_pretrained_cfg(card.preprocessing, outputs)
        labels = {"label_names": list(classes)} if classes else {}
        described = {**config.get("pretrained_cfg", {}), **given}
        return {**config, "num_classes": outputs, **labels, "pretrained_cfg": described}
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: k for k, name in enumerate(classes)}}
    return config | (labels if classes else {})


def _readme(card: ModelCard) -> str:
    """With the licence where the hub, and `saccade convert`, look for it."""
    line = " ".join(card.licence.split())
    simple = re.fullmatch(r"[\w.-]+", line)
    head = [f"license: {line.lower()}" if simple else f"license: other\nlicense_name: {line}"]
    if card.training_data:
        head.append(f"datasets:\n- {' '.join(card.training_data.split())}")
    body = [f"# {card.model}", card.provenance, f"Training data: {card.training_data}" if card.training_data else ""]
    return "\n".join(["---", *head, "---", "", "\n\n".join(part for part in body if part), ""])


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """A folder with all of its files, or none."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(temporary)
        os.rename(temporary, out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); free space or choose another") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""Recipes for translation, and from parallel text and a few wishes to the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from saccade.config import FEWEST, RunConfig, build_config, closest, merge
from saccade.data.text.splits import open_text_splits
from saccade.errors import UserError
from saccade.models import TRANSLATORS, model_row, task_of
from saccade.models.recurrent import RecurrentRow
from saccade.models.translator import TranslatorRow
from saccade.recipes.summary import DataSummary
from saccade.weights.load import load_weights

LARGE = 1_000_000  # pairs from which on the base size of the paper is worth its time
ADAM = {"name": "adamw", "beta2": 0.98, "weight_decay": 1e-4}
RECURRENT = {"lr": 3e-3, "optimizer": ADAM}  # instead of Muon: the matrices of LSTM and GRU are several in one


def translate(data: DataSummary) -> dict[str, Any]:
    """Tens of thousands of pairs of sentences or more, nothing pre-trained.

    Few pairs want few subwords and small batches, https://arxiv.org/abs/1905.11901; normalisation before each part and
    Muon learn several times as much in the first thousand steps.

    Command: `saccade train multi30k --task translate --minutes 60` (28,000 pairs, English to German).
    Cost and result: docs/translation.md.
    """
    if data.samples >= LARGE:
        return {
            "model": "transformer_base",
            "lr": 7e-4,
            "text": {"vocabulary": 32_000, "batch_tokens": 16_384},
            "optimizer": {"beta2": 0.98, "weight_decay": 0.0},
            "schedule": {"shape": "inverse_sqrt", "warmup": 0.08},
            "loss": {"label_smoothing": 0.1},
            "ema": {"decay": 0.999},
            "epochs": 20,
        }
    return {
        "model": "transformer_tiny",
        "lr": 5e-3,
        "text": {"vocabulary": 4000, "batch_tokens": 1024},
        "network": {"dropout": 0.2, "norm_first": True},
        "optimizer": {"name": "muon", "beta2": 0.98, "weight_decay": 0.05},
        "schedule": {"shape": "cosine", "warmup": 0.08},
        "loss": {"label_smoothing": 0.1},
        "ema": {"decay": 0.998},
        "epochs": 40,
    }


def translate_fine_tune(data: DataSummary) -> dict[str, Any]:
    """All weights of a model that translates already, gently, with its own tokenizer.

    Command: `saccade train talks --weights Helsinki-NLP/opus-mt-en-de`.
    Cost and result: not measured.
    """
    values = translate(data)
    return {**values, "lr": 1e-4, "network": {}, "optimizer": ADAM, "schedule": {"warmup": 0.1}, "epochs": 5}


def refuse_settings(changes: Mapping[str, Any], branches: tuple[str, ...], are_for: str, but: str) -> None:
    """Settings that would change nothing are refused, rather than let anyone believe that they did."""
    given = [f"--{branch}.{name}".replace("_", "-") for branch in branches for name in changes.get(branch) or ()]
    if given:
        are, them = ("is", "it") if len(given) == 1 else ("are", "them")
        raise UserError(f"{', '.join(given)}: {are} for {are_for}, and {but}; leave {them} out")


RECIPES = {"translate": translate, "translate_fine_tune": translate_fine_tune}


def resolve_text(changes: Mapping[str, Any], asked: RunConfig) -> RunConfig:
    """The settings of a run that learns to translate; `out` is left to the caller."""
    if "batch_size" in changes:
        raise UserError(
            f"--batch-size {asked.batch_size}: batches of texts are bounded by their tokens; use --text.batch-tokens"
        )
    refuse_settings(changes, ("preprocessing", "augment"), "pictures", f"{asked.data} holds texts")
    start: dict[str, Any] = {}
    usual: tuple[str, str] | None = None
    row = model_row(asked.model) if "model" in changes else None
    if row is not None and task_of(row) != "translate":
        raise UserError(
            f"--model {asked.model}: does not translate, and {asked.data} holds pairs of texts; "
            f"{', '.join(TRANSLATORS)} do"
        )
    if asked.train_part == "head":
        raise UserError("--train-part head: a translator has no head; leave it out")
    if asked.distributed.strategy == "fsdp":
        raise UserError("--distributed.strategy fsdp: translators are not sharded; use ddp")
    if asked.weights is not None:
        loaded = load_weights(asked.weights)
        if not isinstance(loaded.row, TranslatorRow):
            raise UserError(f"{asked.weights}: holds a {loaded.card.model}, which does not translate")
        row, start, usual = loaded.row, {"model": loaded.card.model}, loaded.card.languages
        given = changes.get("text") or {}
        of_tokenizer = {name: given[name] for name in ("vocabulary", "tokenizer") if name in given}
        own = f"{asked.weights} has one already"
        refuse_settings({"text": of_tokenizer}, ("text",), "a tokenizer that is learnt", own)
        if "max_length" in given and asked.text.max_length > row.max_length:
            raise UserError(
                f"--text.max-length {asked.text.max_length}: {asked.weights} takes {row.max_length} tokens at most; "
                "give no more, or leave it out"
            )
    text, sources = asked.text, asked.sources
    splits = open_text_splits(
        Path(asked.data),
        val=None if asked.val is None else Path(asked.val),
        val_fraction=sources.val_fraction,
        seed=sources.split_seed,
        source=text.source,
        target=text.target,
        usual=usual,
    )
    if isinstance(row, TranslatorRow) and row.vocabulary:
        start["text"] = {"vocabulary": max(row.vocabulary, FEWEST)}  # a small text gives fewer
    if usual is not None and splits.train.languages == usual:
        start.setdefault("text", {}).update(source=usual[0], target=usual[1])
    name = asked.recipe
    if name == "auto":
        name = "translate" if asked.weights is None else "translate_fine_tune"
    elif name not in RECIPES:
        raise UserError(f"recipe: {name!r} is none for texts{closest(name, tuple(RECIPES))}; use {', '.join(RECIPES)}")
    recipe = merge(RECIPES[name](DataSummary("translate", len(splits.train), 0, 0, 0)), start)
    row = row or model_row(str(recipe["model"]))
    assert isinstance(row, TranslatorRow)
    if isinstance(row, RecurrentRow) and recipe["optimizer"].get("name") == "muon":
        recipe = {**recipe, **RECURRENT}
    if asked.weights is None:  # wider ones want smaller steps, https://arxiv.org/abs/2203.03466
        recipe["lr"] *= min(1.0, TRANSLATORS[str(recipe["model"])].width / row.width)
    known = {field.name for field in fields(row)}
    recipe["network"] = {key: value for key, value in recipe.get("network", {}).items() if key in known}
    settings = merge(recipe, changes)
    if any(changes.get(length) is not None for length in ("minutes", "steps")):
        settings["epochs"] = changes.get("epochs")
    settings["recipe"], settings["task"] = name, "translate"
    config = build_config({"out": "", **settings})
    if asked.weights is not None and row.max_length < config.text.max_length:  # its places are no more
        config = config.model_copy(update={"text": config.text.model_copy(update={"max_length": row.max_length})})
    row.changed(config.network)  # a setting that this family lacks is refused before work
    return config

"""Texts and their translations for a run: all of them in memory as numbers, so that a batch costs next to nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saccade.config import RunConfig
from saccade.data.text.batches import EncodedPairs, TextBatch, TrainPlan, eval_batches
from saccade.data.text.pairs import Pairs
from saccade.data.text.splits import open_text_splits
from saccade.data.text.tables import SIDES
from saccade.engine import distributed
from saccade.engine.distributed import World
from saccade.engine.plan import planned_row
from saccade.errors import UserError
from saccade.metrics.translation import doubt
from saccade.models.translator import TranslatorRow
from saccade.tasks import Task
from saccade.tasks.translation import TranslationTask
from saccade.tokenizer import NAMED, Tokenizer, learn_tokenizer, listed, read_tokenizer, unknown_characters
from saccade.weights.load import load_weights
from saccade.weights.model_file import write_atomically
from saccade.words import counted, language

KEPT = "tokenizer.json"  # in a run's folder
LIMIT = "--text.max-length"


class TextData:
    """See RunData."""

    task = "translate"
    class_names: tuple[str, ...] = ()
    samples, counted, smaller = "pairs", "tokens", "--text.batch-tokens"

    def __init__(self, config: RunConfig, world: World, device: torch.device, folder: Path | None):
        if config.distributed.strategy == "fsdp" and world.size > 1:
            raise UserError("--distributed.strategy fsdp: translators are not sharded; use ddp")
        self.config, self.world = config, world
        text, sources = config.text, config.sources
        splits = open_text_splits(
            Path(config.data),
            val=None if config.val is None else Path(config.val),
            val_fraction=sources.val_fraction,
            seed=sources.split_seed,
            source=text.source,
            target=text.target,
        )
        self.path, self.notes = splits.train.path, list(splits.notes)
        self.notes += [what] if (what := doubt(splits.val.languages[1], splits.val.targets)) else []
        self.tokenizer: Tokenizer = self._tokenizer(splits.train, folder)
        self.train, self.train_pairs = self._fitting(splits.train, folder)
        self.val, self.val_pairs = splits.val, self._cut(splits.val, folder)
        self.notes += self._unknown() if config.weights is not None else []
        self.plan = TrainPlan(self.train_pairs.lengths, text.batch_tokens, config.seed, world.size)

    def _tokenizer(self, train: Pairs, folder: Path | None) -> Tokenizer:
        """That of the run which is continued, or of the weights to start from; else it is learnt."""
        if folder is not None and (folder / KEPT).exists():
            try:
                kept = (folder / KEPT).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{folder / KEPT}: cannot be read ({error}); without it, it is learnt anew") from None
            return read_tokenizer(kept, str(folder / KEPT))
        if self.config.weights is not None:
            card = load_weights(self.config.weights).card
            self.notes += other_direction(card.languages, train.languages)
            if card.tokenizer is None:
                raise UserError(f"{self.config.weights}: a {card.model} without a tokenizer; it cannot translate")
            return read_tokenizer(card.tokenizer, self.config.weights)
        text = self.config.text
        learnt = learn_tokenizer([*train.sources, *train.targets], text.vocabulary, text.tokenizer)
        return read_tokenizer(distributed.from_main(learnt.to_text(), self.world), "tokenizer")

    def _limit(self, folder: Path | None) -> str:
        """What bounds the length of texts: a setting, or the weights to start from, which take no more."""
        weights = self.config.weights
        if weights is None:
            return LIMIT
        row = (None if folder is None else planned_row(folder)) or load_weights(weights).row
        most = self.config.text.max_length
        full = isinstance(row, TranslatorRow) and row.max_length <= most
        return f"{weights} takes no more" if full else LIMIT

    def _fitting(self, pairs: Pairs, folder: Path | None) -> tuple[Pairs, EncodedPairs]:
        """Without pairs that are too long to learn from, which is said."""
        most = self.config.text.max_length
        encoded = encode(self.tokenizer, pairs, None)
        fits = encoded.lengths.max(axis=1) <= most
        if fits.all():
            return pairs, encoded
        out, limit = np.flatnonzero(~fits), self._limit(folder)
        if len(out) == len(pairs):
            remedy = "allow more" if limit == LIMIT else "give shorter texts"
            raise UserError(f"{pairs.path}: every pair has more than {most} tokens on a side ({limit}); {remedy}")
        left = f"{counted(len(out), 'pair')} of more than {most} tokens {'is' if len(out) == 1 else 'are'} left out"
        self.notes.append(f"{left} ({pairs.some(out)}; {limit})")
        kept = pairs.subset(np.flatnonzero(fits))
        return kept, encode(self.tokenizer, kept, None)

    def _cut(self, pairs: Pairs, folder: Path | None) -> EncodedPairs:
        """What is measured on has all pairs; how many are cut is said."""
        most = self.config.text.max_length
        encoded = encode(self.tokenizer, pairs, None)
        long = np.flatnonzero(encoded.lengths.max(axis=1) > most)
        if not len(long):
            return encoded
        are = "is" if len(long) == 1 else "are"
        self.notes.append(
            f"{counted(len(long), 'pair')} for validation of more than {most} tokens {are} cut there "
            f"({pairs.some(long)}; {self._limit(folder)})"
        )
        return encode(self.tokenizer, pairs, most)

    def _unknown(self) -> list[str]:
        """A note of characters that the tokenizer of the weights does not know, and that the model cannot learn."""
        has = np.zeros(len(self.train), dtype=bool)
        characters: dict[str, None] = {}
        for k, side in enumerate((self.train.sources, self.train.targets)):
            for i in np.flatnonzero(self.train_pairs.holds(k, self.tokenizer.unknown)):
                has[i] = True
                if len(characters) <= NAMED:
                    characters.update(dict.fromkeys(unknown_characters(self.tokenizer, side[i], target=k == 1)))
        if not has.any():
            return []
        count, where = int(has.sum()), self.train.some(np.flatnonzero(has))
        of = f"{counted(count, 'pair')} of {len(has)} {'has' if count == 1 else 'have'} characters"
        return [f"{of} that {self.config.weights} does not know and cannot learn{listed([*characters])} ({where})"]

    def __len__(self) -> int:
        return len(self.train)

    @property
    def languages(self) -> tuple[str, str]:
        return self.train.languages

    @property
    def about(self) -> str:
        of, into = self.train.languages
        tokens = f"{self.tokenizer.size} tokens in the vocabulary"
        return f"{len(self)} pairs {of}-{into}, {len(self.val)} for validation, {tokens}"

    @property
    def about_steps(self) -> str:
        return f"up to {self.config.text.batch_tokens} tokens of either language"

    @property
    def batches_per_epoch(self) -> int:
        return self.plan.per_epoch

    def name(self, i: int) -> str:
        return self.train.id(i)

    def hash(self) -> str:
        digest = hashlib.sha256(self.train.digest() + self.val.digest())
        digest.update(self.tokenizer.to_text().encode())
        return digest.hexdigest()

    def keep(self, folder: Path) -> None:
        write_atomically(folder / KEPT, self.tokenizer.to_text().encode())

    def serve(self, task: Task) -> None:
        """Batches of texts are the same for every task; how long translations are is not."""
        assert isinstance(task, TranslationTask)
        task.expect(self.train_pairs.lengths)
        task.into = self.train.languages[1]

    def train_batches(self, start: int, stop: int | None) -> Generator[TextBatch, None, None]:
        for indices in self.plan.batches(start, stop):
            yield self.train_pairs.batch(indices[self.world.rank :: self.world.size])

    def eval_batches(self) -> Generator[TextBatch, None, None]:
        return eval_batches(self.val, self.val_pairs, self.config.text.batch_tokens, self.world.rank, self.world.size)

    def inputs(self, batch: TextBatch) -> Tensor:
        return batch.source

    def amount(self, batch: TextBatch) -> int:
        """Of the translations: what is learnt to be said."""
        return batch.targets.count


def other_direction(known: tuple[str, str] | None, languages: tuple[str, str]) -> list[str]:
    """A note where texts are not of the languages that a model is `known` to translate."""
    if known is None or {*known, *languages} & {name for sides in SIDES for name in sides}:
        return []
    one, other = (tuple(language(code) for code in each) for each in (known, languages))
    said = f"the model translates {' to '.join(known)}; this is {' to '.join(languages)}"
    return [] if one == other else [said]


def encode(tokenizer: Tokenizer, pairs: Pairs, most: int | None) -> EncodedPairs:
    """Texts as numbers; with `most`, longer ones are cut and end there."""
    sources, targets = tokenizer.encode(pairs.sources), tokenizer.encode(pairs.targets, target=True)
    if most is not None:
        sources, targets = (
            [each if len(each) <= most else [*each[: most - 1], tokenizer.end] for each in side]
            for side in (sources, targets)
        )
    return EncodedPairs(sources, targets, tokenizer.pad)

"""What both sides are asked about a translator: real texts, then tokens made up, and which translations they find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.data.text.splits import find_pairs, holds_text, read_texts
from saccade.decoding import beam_search, greedy
from saccade.errors import UserError
from saccade.models.translator import Translator, TranslatorRow
from saccade.tokenizer import read_tokenizer
from saccade.verification.compare import Judged, Outcome, run_ours, run_theirs
from saccade.weights.export import tokenizer_files
from saccade.weights.fingerprint import hash_texts
from saccade.weights.formats.table import Rule, Stage, TranslatorPeer

SAMPLES = (
    "A dog runs through the deep snow.",
    "Two women in red coats are waiting for the 7:45 bus, which is late again.",
    "Why?",
    "The naïve café owner doesn't sell ☃ here; nobody laughed.",
)
MOST = 4  # texts of a file that are compared
LONGEST = 64  # tokens of a text; the rest is cut off
MADE_UP = 2  # further texts of made-up tokens, for a vocabulary that sentences hardly touch
SHORTEST, MORE = 5, 3  # tokens of the first made-up row, and more in each one after it
FOUND = 32  # tokens of a translation that is searched, the end included
BEAMS = 4


@dataclass(frozen=True)
class Texts:
    """Texts, their translations and both as numbers, filled up with padding."""

    lines: tuple[str, ...]
    translations: tuple[str, ...]  # real ones, or none: then their tokens are made up
    source: Int[Tensor, "B S"]
    targets: Int[Tensor, "B T"]
    pad: int
    origin: str

    @property
    def sha256(self) -> str:
        """Of the texts themselves: tokens are what a tokenizer makes of them, which may be wrong."""
        return hash_texts((*self.lines, "", *self.translations))

    @property
    def given(self) -> dict[str, Tensor]:
        """What the tokenizer made of the texts, and of their translations where these are real."""
        sides = (self.source[: len(self.lines)], self.targets[: len(self.translations)])
        return _given(*([row[row != self.pad].tolist() for row in side] for side in sides))

    @property
    def facts(self) -> dict[str, Any]:
        shape = {"count": len(self.source), "tokens": self.source.shape[1], "translation_tokens": self.targets.shape[1]}
        return {"sha256": self.sha256, **shape, "origin": self.origin}


def choose_texts(data: str | Path | None, tokenizer: str | None, row: TranslatorRow, where: str) -> Texts:
    """A few of a file, spread evenly over it, or sentences that are always at hand and rows of made-up tokens.

    `data` is a file with a text in each line, or texts with their translations, which then are learnt from.
    """
    if tokenizer is None:
        raise UserError(f"{where}: holds no tokenizer, without which it cannot read; get the file anew")
    reader = read_tokenizer(tokenizer, where)
    lines, translations, origin = (SAMPLES, (), f"{len(SAMPLES)} sentences") if data is None else _some(Path(data))
    longest = min(LONGEST, row.max_length)
    sources, targets = _cut(reader.encode(lines), longest), _cut(reader.encode(translations, target=True), longest)
    if data is None:
        sources += [_made_up(row, k, longest) for k in range(MADE_UP)]
        origin += f" and {MADE_UP} rows of made-up tokens"
    if not targets:
        targets = [_made_up(row, MADE_UP + k, longest) for k in range(len(sources))]
    return Texts(lines, translations, _table(sources, row.pad), _table(targets, row.pad), row.pad, origin)


def _cut(rows: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """The last token, the end, stays."""
    return [list(row) if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]


def _table(rows: Sequence[Sequence[int]], fill: int, width: int | None = None) -> Int[Tensor, "B N"]:
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long)


def _some(data: Path) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    if data.is_dir() or holds_text(data):
        found = find_pairs(data)
        if not found.splits:
            raise UserError(str(found.problems[0]))
        pairs = next(iter(found.splits.values()))
        sides = pairs.sources, pairs.targets
    else:
        sides = tuple(line for line in read_texts(data) if line.strip()), ()
    if not sides[0]:
        raise UserError(f"--data {data}: is empty; give a file with a text in each line")
    chosen = np.linspace(0, len(sides[0]) - 1, min(MOST, len(sides[0]))).astype(int)
    lines, translations = (tuple(side[i] for i in chosen) if side else () for side in sides)
    return lines, translations, str(data)


def _made_up(row: TranslatorRow, k: int, longest: int) -> list[int]:
    """Row number `k` of tokens that are spread over the vocabulary, the same everywhere, and the end."""
    steering = {row.pad, row.begin, row.end}
    length = min(SHORTEST + MORE * k, longest - 1)
    tokens = ((7919 * (i + 1) * (k + 1) + 104_729 * k) % row.vocabulary for i in range(length))
    return [*(token for token in tokens if token not in steering), row.end]


# --- both sides ------------------------------------------------------------------------------------------------------


def ask_ours(network: Translator, texts: Texts, stages: Sequence[Stage]) -> Outcome:
    """Logits of all places at once, and again token by token, as translations are found."""
    row = network.config
    first = torch.full_like(texts.targets[:, :1], row.begin)
    inputs = torch.cat((first, texts.targets[:, :-1]), dim=1)

    def call(source: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(source, inputs).logits
        return logits, F.cross_entropy(logits.flatten(0, 1), texts.targets.flatten(), ignore_index=row.pad)

    def predict(source: Tensor) -> Tensor:
        state = network.begin(source)
        return torch.cat([state.advance(inputs[:, t : t + 1]) for t in range(inputs.shape[1])], dim=1)

    def translate(source: Tensor, most: int, beams: int) -> list[list[int]]:
        if beams == 1:
            return greedy(network, source, most)
        return [list(found[0].tokens) for found in beam_search(network, source, most, beams=beams)]

    outcome = run_ours(network, call, predict, texts.source, stages, _judge)
    return replace(outcome, answers=_searched(translate, texts, row), given=texts.given)


def ask_theirs(
    model: nn.Module,
    peer: TranslatorPeer,
    texts: Texts,
    row: TranslatorRow,
    tokenizer: str,
    stages: Sequence[Stage],
    rules: Sequence[Rule],
    parameters: Sequence[str],
) -> Outcome:
    """The reference with its own loss, its own search and its own tokenizer."""

    def call(model: nn.Module, source: Tensor) -> tuple[Tensor, Tensor]:
        return peer.outputs(model, source, texts.targets)

    def translate(source: Tensor, most: int, beams: int) -> list[list[int]]:
        return peer.translate(model, source, most, beams)

    outcome = run_theirs(model, call, texts.source, stages, _judge, rules, parameters)
    files, longest = tokenizer_files(tokenizer), min(LONGEST, row.max_length)
    sides = (
        _cut(peer.encode(files, side, k == 1), longest) if side else []
        for k, side in enumerate((texts.lines, texts.translations))
    )
    return replace(outcome, answers=_searched(translate, texts, row), given=_given(*sides))


def _judge(outputs: tuple[Tensor, Tensor]) -> Judged:
    return Judged(*outputs)


def _searched(
    translate: Callable[[Tensor, int, int], list[list[int]]], texts: Texts, row: TranslatorRow
) -> dict[str, Tensor]:
    """What both sides find, token for token; -1 behind the last one."""
    most = min(FOUND, row.max_length)
    with torch.no_grad():
        found = {beams: translate(texts.source, most, beams) for beams in (1, BEAMS)}
    names = {1: "greedy translation", BEAMS: f"translation by {BEAMS} beams"}
    return {names[beams]: _table(rows, -1, most) for beams, rows in found.items()}


def _given(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    named = {"tokens of the texts": sources, "tokens of their translations": targets}
    return {name: _table(rows, -1) for name, rows in named.items() if rows}

"""What a model says in another language: the text, and which words it came from."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saccade.drawing import FAINT, chart_style, shorten
from saccade.errors import UserError
from saccade.predictions.cards import write_new

INCH = 0.34  # of a token's row or column
LONG = 60  # tokens; more cannot be read in one picture
EVEN = 3  # times an even share of all tokens is the darkest, at least: what is taken from all alike must look pale
NAME = 40  # letters of a file's name
LETTERS = 13  # of a title in an inch
MARKS = {"·": "goes on with the word", "■": "the end", "⁇": "not known to the model"}


def _labels(tokens: Sequence[str]) -> list[str]:
    """As they are shown: what goes on with the word before has a mark, what begins one its letters alone."""
    labels = []
    for i, token in enumerate(tokens):
        begins = token.startswith(" ") or i == 0 or not token[:1].isalnum() or not tokens[i - 1][-1:].isalnum()
        labels.append((token.removeprefix(" ") or "␣") if begins else f"·{token}")
    return labels


def _darkest(table: np.ndarray) -> float:
    return max(float(table.max()), min(1.0, EVEN / table.shape[1]))


@dataclass(frozen=True, eq=False)
class Translation:
    """The translation of one text."""

    source: str
    text: str
    # sum of its tokens' logarithmic probabilities / length ** length_penalty (at 1 their mean); none where it was drawn
    score: float | None = None
    cut: bool = False  # it ended by the limit, not by itself
    note: str = ""  # what was changed on the way
    source_tokens: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()  # of the translation; the last is its end
    # what each token of the translation was taken from (T, S): attention, none of models without; rows sum to one
    alignment: np.ndarray | None = field(default=None, repr=False)
    # how much each token's probability hangs on each of the text, by gradients (T, S); rows sum to one
    relevance: np.ndarray | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """For a file: the beginning of the text."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.source[:NAME]).strip("-") or "text"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts: dict[str, Any] = {"source": self.source, "translation": self.text, "score": self.score, "cut": self.cut}
        if self.note:
            facts["note"] = self.note
        if self.relevance is not None:
            facts |= {"source_tokens": list(self.source_tokens), "tokens": list(self.tokens)}
            for name in ("alignment", "relevance"):
                table = getattr(self, name)
                facts[name] = None if table is None else [[round(float(share), 5) for share in row] for row in table]
        return facts

    def save(self, path: str | Path) -> Path:
        """Draw which words of the text each word came from; the same as data lies beside it as JSON.

        A path without a suffix is a folder, in which the file is named after the text. No file is ever overwritten.
        Returns where the picture is.
        """
        if self.relevance is None:
            raise UserError("there is nothing to draw: translate with explained=True, or with --save")
        written = write_new(self._draw(), path, f"{self.name}.png")
        data = written.with_suffix(".json")
        if data.exists():  # that of a picture of another format
            data = written.with_name(f"{written.name}.json")
        try:
            with open(data, "x", encoding="utf-8") as file:
                file.write(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{data}: cannot be written ({error.strerror or error})") from None
        return written

    def _draw(self) -> Image.Image:
        from matplotlib.figure import Figure

        assert self.relevance is not None
        tables = [("relevance, by gradients", self.relevance)]
        if self.alignment is not None:
            tables.insert(0, ("attention to the text", self.alignment))
        T, S = (min(LONG, length) for length in self.relevance.shape)
        with chart_style():
            width = max(len(tables) * (INCH * S + 1.6) + 0.4, 6.0)
            figure = Figure(figsize=(width, max(INCH * T + 2.6, 3.6)), layout="constrained")
            letters = int(width * LETTERS)
            figure.suptitle(f"{shorten(self.source, letters)}\n{shorten(self.text, letters)}", fontsize=10)
            darkest = [f"{100 * _darkest(table):.0f} %" for _, table in tables]
            marks = [f"white 0, darkest {' left and '.join(darkest)}{' right' if len(darkest) > 1 else ''}"]
            axes = figure.subplots(1, len(tables), squeeze=False)[0]
            for axis, (title, table) in zip(axes, tables, strict=True):
                axis.imshow(table[:T, :S], cmap="Blues", vmin=0, vmax=_darkest(table), aspect="auto")
                axis.set_title(title)
                names = _labels(self.source_tokens[:S])
                axis.set_xticks(range(S), names, rotation=60, ha="left", rotation_mode="anchor")
                axis.set_yticks(range(T), _labels(self.tokens[:T]))
                axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
                for spine in axis.spines.values():
                    spine.set_visible(False)
            shown = [*self.source_tokens[:S], *self.tokens[:T]]
            marks += [f"{mark} {what}" for mark, what in MARKS.items() if any(mark in each for each in _labels(shown))]
            if self.relevance.shape != (T, S):
                marks.append(f"the first {LONG} tokens of either side")
            figure.supxlabel("; ".join(marks), fontsize=9, color=FAINT)
            file = io.BytesIO()
            figure.savefig(file, dpi=130, format="png")
        return Image.open(file).convert("RGB")

"""What a model says in another language: the text, and which words it came from."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image

from saccade.drawing import FAINT, INK, chart_style, shorten
from saccade.errors import UserError
from saccade.predictions.cards import write_new

INCH = 0.34  # of a token's row or column
LONG = 60  # tokens; more cannot be read in one picture
EVEN = 3  # times an even share of all tokens is the darkest, at least: what is taken from all alike must look pale
NAME = 40  # letters of a file's name
TITLE = 70  # characters of either text in a picture's title
END, UNKNOWN, SPACE = "■", "⁇", "␣"
MARKS = {END: "is the end", UNKNOWN: "a token that the model does not know", SPACE: "a space"}


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
        from matplotlib.transforms import ScaledTranslation

        assert self.relevance is not None
        tables = [("relevance, by gradients", self.relevance)]
        if self.alignment is not None:
            tables.insert(0, ("attention to the text", self.alignment))
        T, S = (min(LONG, length) for length in self.relevance.shape)
        said, given = self.tokens[:T], self.source_tokens[:S]
        width = max(len(tables) * (INCH * S + 1.6) + 0.4, 4.5)
        title = f"{shorten(self.source, TITLE)}  →  {shorten(self.text, TITLE)}"
        with chart_style():
            figure = Figure(figsize=(width, max(INCH * T + 3.2, 4.0)), layout="constrained")
            figure.suptitle(fill(title, round(9 * width)), x=0.01, ha="left", fontsize=12, fontweight="bold")
            axes = figure.subplots(1, len(tables), squeeze=False)[0]
            for axis, (name, table) in zip(axes, tables, strict=True):
                darkest = max(float(table.max()), min(1.0, EVEN / table.shape[1]))
                axis.imshow(table[:T, :S], cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
                shades = f"shares of a row: white 0, darkest {darkest:.2f}"
                axis.set_title(f"{name}\n{shades}", fontsize=10, fontweight="normal")
                axis.set_xticks(range(S), map(_shown, given), rotation=60, ha="left", rotation_mode="anchor")
                axis.set_yticks(range(T), map(_shown, said))
                axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, pad=8)
                for spine in axis.spines.values():
                    spine.set_visible(False)
                above = axis.get_xaxis_transform() + ScaledTranslation(0, 4 / 72, figure.dpi_scale_trans)
                beside = axis.get_yaxis_transform() + ScaledTranslation(-4 / 72, 0, figure.dpi_scale_trans)
                line = {"color": INK, "linewidth": 1.2, "clip_on": False, "solid_capstyle": "butt"}
                for first, last in words(given):
                    axis.plot([first - 0.38, last + 0.38], [1, 1], transform=above, **line)
                for first, last in words(said):
                    axis.plot([0, 0], [first - 0.38, last + 0.38], transform=beside, **line)
            figure.supxlabel(fill(self._legend(T, S), round(14 * width)), fontsize=9, color=FAINT, x=0.01, ha="left")
            file = io.BytesIO()
            figure.savefig(file, dpi=130, format="png")
        return Image.open(file).convert("RGB")

    def _legend(self, T: int, S: int) -> str:
        """What a reader of the picture has to know."""
        shown = [_shown(token) for token in (*self.tokens[:T], *self.source_tokens[:S])]
        marks = [f"{mark} {what}" for mark, what in MARKS.items() if mark in shown]
        parts = ["A row: a token of the translation, and how its 1 is shared out to the tokens of the text",
                 "a line joins the tokens of one word", *marks]  # fmt: skip
        if self.relevance is not None and self.relevance.shape != (T, S):
            parts.append(f"only the first {LONG} tokens of either side are drawn")
        return "; ".join(parts) + "."


def words(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """The first and the last place of each word of several tokens; the first of them begins with a space."""
    found: list[tuple[int, int]] = []
    start = 0
    for i in range(1, len(tokens) + 1):
        pair = tokens[i - 1 : i + 1]
        if len(pair) < 2 or pair[1].startswith(" ") or not all(any(map(str.isalnum, token)) for token in pair):
            if i - start > 1:
                found.append((start, i - 1))
            start = i
    return found


def _shown(token: str) -> str:
    return token.replace(" ", "", 1) or SPACE

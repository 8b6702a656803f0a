"""How good translations are: BLEU and chrF as sacreBLEU computes them, and how sure the model was of the references."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from saccade.errors import UserError
from saccade.metrics.folder import begin_folder
from saccade.words import counted, language

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

SHOWN = 5  # examples of a report
SEPARATORS = re.compile(r"[\t\r\n]")
# How sacreBLEU takes texts apart that have no spaces between words; all others its usual way, 13a
BLEU_TOKENS = {"zh": "zh", **dict.fromkeys(("ja", "th", "lo", "km", "my"), "char")}


HAN_OR_KANA = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def doubt(code: str, references: Sequence[str]) -> str:
    """Where texts without spaces are taken apart at spaces, because their language `code` says nothing else: a note."""
    if language(code) in BLEU_TOKENS:
        return ""
    text = "".join(references)
    if 2 * len(HAN_OR_KANA.findall(text)) < len("".join(text.split())) or not text:
        return ""
    return (
        f"BLEU takes the references apart at spaces, being of {code!r}, but they look like Chinese or Japanese; "
        "call the column or the files zh or ja"
    )


@dataclass(frozen=True)
class Example:
    """A text, its translation, and what it is compared with."""

    index: int
    source: str
    translation: str
    reference: str


@dataclass(frozen=True)
class TranslationReport:
    """BLEU (https://arxiv.org/abs/1804.08771) and chrF (https://aclanthology.org/W15-3049) from 0 to 100, of all texts
    together; loss and perplexity by token of the references."""

    files: ClassVar[tuple[str, ...]] = ("metrics.json", "translations.tsv")

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    loss: float  # mean negative logarithm of a reference token's probability
    perplexity: float
    texts: int
    tokens: int  # of the references, ends included
    written: int  # tokens of the translations, ends included
    seconds: float  # that the translating took
    cut: int  # translations that did not end by themselves but by the limit of their length
    decoding: str
    examples: tuple[Example, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        return f"<TranslationReport: {counted(self.texts, 'text')}; BLEU {self.bleu:.2f}, chrF {self.chrf:.2f}>"

    @property
    def tokens_per_second(self) -> float:
        return self.written / self.seconds if self.seconds else math.nan

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the translations themselves."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "examples"}
        return {**values, "tokens_per_second": self.tokens_per_second}

    def render(self, console: Console) -> None:
        def say(text: str) -> None:
            console.print(text, markup=False, emoji=False, soft_wrap=True)

        say(f"BLEU {self.bleu:.2f}   chrF {self.chrf:.2f}   on {self.texts} texts, {self.decoding}")
        say(f"loss {self.loss:.4f} a token, perplexity {self.perplexity:.3f}")
        say(f"{self.tokens_per_second:.0f} tokens a second ({self.seconds:.1f} s)")
        if self.cut:
            say(f"{counted(self.cut, 'translation')} did not end, and {'was' if self.cut == 1 else 'were'} cut off")
        say(f"signatures: BLEU {self.bleu_signature}, chrF {self.chrf_signature}")
        for example in self.examples[:SHOWN]:
            say(f"\n  {example.source}\n  -> {example.translation}\n  =  {example.reference}")

    def save(self, folder: str | Path, of: Mapping[str, Any] | None = None) -> Path:
        """`metrics.json` (with what it is `of`, if given), and every translation beside its reference in
        `translations.tsv`, a text in each cell as it is but for tabs and line ends, which are spaces there. UserError
        where the folder holds a report, or cannot be written."""
        folder = begin_folder(folder, self.to_dict(), of)
        rows = [("source", "translation", "reference")]
        rows += [(each.source, each.translation, each.reference) for each in self.examples]
        lines = ["\t".join(SEPARATORS.sub(" ", cell) for cell in row) + "\n" for row in rows]
        try:
            (folder / "translations.tsv").write_text("".join(lines), encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
        return folder


class TranslationMetric:
    """Collects translations; the same figures for any batching and any number of processes."""

    def __init__(self, decoding: str, language: str = ""):
        self.decoding, self.language = decoding, language
        self.examples: dict[int, Example] = {}
        self.losses: dict[int, float] = {}  # sums over a text's tokens
        self.tokens = self.written = self.cut = 0
        self.seconds = 0.0

    def update(
        self,
        examples: list[Example],
        losses: list[float],
        tokens: int,
        written: int,
        seconds: float,
        cut: int,
    ) -> None:
        """`losses`: of each text's reference, summed over its tokens; `cut`: translations that the limit ended."""
        for example, loss in zip(examples, losses, strict=True):
            self.examples[example.index], self.losses[example.index] = example, loss
        self.tokens += tokens
        self.written += written
        self.seconds += seconds
        self.cut += cut

    def state(self) -> dict[str, Any]:
        """For another process's `merge`."""
        return {name: value for name, value in self.__dict__.items() if name not in ("decoding", "language")}

    def merge(self, state: dict[str, Any]) -> None:
        self.examples.update(state["examples"])
        self.losses.update(state["losses"])
        self.tokens += state["tokens"]
        self.written += state["written"]
        self.cut += state["cut"]
        self.seconds = max(self.seconds, state["seconds"])  # processes work side by side

    def compute(self) -> TranslationReport:
        from sacrebleu.metrics import BLEU, CHRF

        if not self.examples:
            raise UserError("no text was translated; there is nothing to measure")
        ordered = [self.examples[index] for index in sorted(self.examples)]
        translations, references = [each.translation for each in ordered], [[each.reference for each in ordered]]
        bleu, chrf = BLEU(tokenize=BLEU_TOKENS.get(language(self.language))), CHRF()
        bleu_score = bleu.corpus_score(translations, references)
        chrf_score = chrf.corpus_score(translations, references)
        loss = math.fsum(self.losses.values()) / self.tokens
        return TranslationReport(
            bleu=bleu_score.score,
            chrf=chrf_score.score,
            bleu_signature=str(bleu.get_signature()),
            chrf_signature=str(chrf.get_signature()),
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            texts=len(ordered),
            tokens=self.tokens,
            written=self.written,
            seconds=self.seconds,
            cut=self.cut,
            decoding=self.decoding,
            examples=tuple(ordered),
        )

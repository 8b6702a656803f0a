"""A trained translator and what it makes of texts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.config import LONGEST, SHORTEST, DecodingConfig, RunConfig, TextConfig
from saccade.data.text.batches import MOST, EncodedPairs, eval_batches
from saccade.data.text.pairs import Pairs
from saccade.decoding import Hypothesis, beam_search, sample, stream
from saccade.engine.device import choose_device
from saccade.engine.distributed import World
from saccade.engine.evaluate import evaluate_batches
from saccade.engine.predict import Model
from saccade.errors import UserError
from saccade.metrics.translation import TranslationReport, doubt
from saccade.models.translator import Translator
from saccade.predictions.translation import Translation
from saccade.tasks.translation import TranslationTask
from saccade.tokenizer import Tokenizer, listed, read_tokenizer, unknown_characters
from saccade.weights.convert import check_tokenizer
from saccade.weights.load import load_network
from saccade.weights.model_file import ModelCard
from saccade.words import counted

BEAMS, MOST_BEAMS = 4, 64
PENALTY = 1.0  # of a translation's length
BATCH = 32  # texts at a time
READ_AHEAD = 32  # batches whose texts are sorted by length
ROOM = 20  # tokens that a translation may have beside twice its text's


@dataclass(frozen=True)
class TextModel:
    """A translator with all that is needed to use it. It computes in float32, whatever the device."""

    network: Translator
    tokenizer: Tokenizer
    card: ModelCard
    device: torch.device

    def __repr__(self) -> str:
        return f"<TextModel {self.card.model}: translate, {self.tokenizer.size} tokens; {self.device}>"

    @classmethod
    def load(cls, source: str | Path, *, device: str = "auto") -> TextModel:
        """From a run folder, a model file, or Marian's weights (a hub name or a folder)."""
        model = open_model(source, device=device)
        if not isinstance(model, cls):
            raise UserError(f"{source}: a {model.card.model}, which does not translate")
        return model

    def translate(
        self,
        texts: str | Iterable[str],
        *,
        beams: int | None = None,
        length_penalty: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        explained: bool = False,
        batch_size: int | None = None,
    ) -> list[Translation]:
        """Translations in the order given, by a search with four `beams` and a `length_penalty` of 1, or as given; with
        a `temperature` they are drawn instead, only from the `top_k` likeliest tokens each time, and from the fewest
        that together have the probability `top_p`.

        `explained`: each carries which words it came from. An empty text has an empty translation. The `note` of a
        translation says that its text was longer than the model can take, and cut, or held unknown characters.
        """
        search = Search(beams, length_penalty, temperature, top_k, top_p, seed)
        return list(self.each(_as_texts(texts), search, explained=explained, batch_size=batch_size))

    predict = translate  # as a model of pictures calls it

    def each(
        self,
        texts: Sequence[str],
        search: Search | None = None,
        *,
        explained: bool = False,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Translation]:
        """As `translate`, one after the other while it goes."""
        batch_size = BATCH if batch_size is None else _checked_batch(batch_size)
        return self._each(texts, search or Search(), explained, batch_size, progress)

    def stream(self, text: str) -> Iterator[str]:
        """The translation of the likeliest token each time, piece by piece, each as soon as it is known.

        What the `note` of a translation would say is warned of.
        """
        (text,) = _as_texts([text])
        tokens, note = self._encoded(text)
        if note:
            warnings.warn(f"{shortened(text)}: {note}", stacklevel=2)
        said: list[int] = []
        shown = ""
        if len(tokens) <= 1:
            return
        for token in stream(self.network, torch.tensor([tokens], device=self.device), self._most(len(tokens))):
            said.append(token)
            whole = self.tokenizer.decode([said])[0]
            if len(whole) > len(shown):
                yield whole[len(shown) :]
                shown = whole

    def evaluate(
        self,
        pairs: Pairs,
        *,
        beams: int = BEAMS,
        length_penalty: float = PENALTY,
        batch_tokens: int = 4096,
        batch_size: int = MOST,
        progress: Callable[[int], None] | None = None,
        notes: list[str] | None = None,
    ) -> TranslationReport:
        """BLEU, chrF, loss and speed on texts with their translations, at most `batch_size` at a time.

        Texts that are longer than the model can take are cut, which is added to `notes`, or warned of.
        """
        Search(beams, length_penalty)  # which refuses what is out of bounds
        _checked_batch(batch_size)
        most = self.network.config.max_length
        decoding = DecodingConfig(beams=beams, length_penalty=length_penalty)
        longest = min(max(most, SHORTEST), LONGEST)  # bounds of a setting; the task also keeps to the network's own
        config = RunConfig(data="", text=TextConfig(max_length=longest), decoding=decoding)
        task = TranslationTask(self.tokenizer, config, self.network.config)
        task.into = pairs.languages[1]
        sides = [self.tokenizer.encode(side, target=k == 1) for k, side in enumerate((pairs.sources, pairs.targets))]
        cut = [[self._cut(each) for each in side] for side in sides]
        said: list[str] = []
        long = [i for i, both in enumerate(zip(*sides, strict=True)) if max(map(len, both)) > most]
        if long:
            what = f"{counted(len(long), 'pair')} of more than {most} tokens, all that the model can take, "
            what += f"{'is' if len(long) == 1 else 'are'} cut there ({pairs.some(long)})"
            said.append(what)
        if what := doubt(pairs.languages[1], pairs.targets):
            said.append(what)
        if notes is not None:
            notes += said
        elif said:
            warnings.warn("\n".join(said), stacklevel=2)
        encoded = EncodedPairs(cut[0], cut[1], self.tokenizer.pad)
        return evaluate_batches(
            self.network,
            eval_batches(pairs, encoded, batch_tokens, most=batch_size),
            task,
            lambda batch: batch.source,
            self.device,
            torch.float32,
            World(),
            progress,
        )

    # --- inside ------------------------------------------------------------------------------------------------------

    def _each(
        self,
        texts: Sequence[str],
        search: Search,
        explained: bool,
        batch_size: int,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Translation]:
        chunk = batch_size * READ_AHEAD
        for start in range(0, len(texts), chunk):
            part = texts[start : start + chunk]
            encoded = [self._encoded(text) for text in part]
            order = np.argsort([len(tokens) for tokens, _ in encoded], kind="stable")
            found: dict[int, Translation] = {}
            for first in range(0, len(order), batch_size):
                members = [int(i) for i in order[first : first + batch_size]]
                full = [i for i in members if len(encoded[i][0]) > 1]
                source = self._padded([encoded[i][0] for i in full])
                most = [self._most(len(encoded[i][0])) for i in full]
                hypotheses = search(self.network, source, most, [start + i for i in full])
                for i, hypothesis in zip(full, hypotheses, strict=True):
                    found[i] = self._translation(part[i], encoded[i], hypothesis, explained, search.scored)
                for i in set(members) - set(full):
                    found[i] = Translation(part[i], "")
                if progress is not None:
                    progress(start + first + len(members), len(texts))
            yield from (found[i] for i in range(len(part)))

    def _encoded(self, text: str) -> tuple[list[int], str]:
        (tokens,) = self.tokenizer.encode([text])
        most = self.network.config.max_length
        notes = []
        if len(tokens) > most:
            notes.append(f"cut after {most} of {len(tokens)} tokens, which is all that the model can take")
        if len(text.strip().splitlines()) > 1:
            notes.append("its line ends are taken for spaces; a line is a text of its own where it is given as one")
        if unknown := tokens.count(self.tokenizer.unknown):
            are = "is" if unknown == 1 else "are"
            named = listed(unknown_characters(self.tokenizer, text))
            notes.append(f"{unknown} of {len(tokens) - 1} tokens {are} unknown to the model{named}")
        return self._cut(tokens), "; ".join(notes)

    def _cut(self, tokens: list[int]) -> list[int]:
        most = self.network.config.max_length
        return tokens if len(tokens) <= most else [*tokens[: most - 1], self.tokenizer.end]

    def _most(self, length: int) -> int:
        """Of tokens of a translation: more than twice its text's are only repetition."""
        return min(self.network.config.max_length, 2 * length + ROOM)

    def _padded(self, rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows), default=1)
        filled = [[*row, *[self.tokenizer.pad] * (width - len(row))] for row in rows]
        return torch.tensor(filled, dtype=torch.long, device=self.device).view(-1, width)

    def _translation(
        self, text: str, encoded: tuple[list[int], str], hypothesis: Hypothesis, explained: bool, scored: bool
    ) -> Translation:
        tokens, note = encoded
        (translated,) = self.tokenizer.decode([hypothesis.tokens])
        result = Translation(text, translated, hypothesis.score if scored else None, hypothesis.cut, note)
        if not explained:
            return result
        said = [*hypothesis.tokens, self.tokenizer.end]
        source = torch.tensor([tokens], device=self.device)
        inputs = torch.tensor([[self.network.config.begin, *said[:-1]]], device=self.device)
        with torch.no_grad():
            _, weights = self.network.with_alignment(source, inputs)
        return replace(
            result,
            source_tokens=(*self.tokenizer.pieces(tokens, target=False), "■"),
            tokens=(*self.tokenizer.pieces(said), "■"),
            alignment=None if weights is None else weights[0].cpu().numpy(),
            relevance=relevance(self.network, source, inputs, said),
        )


@dataclass(frozen=True)
class Search:
    """How translations are found: see `TextModel.translate`."""

    beams: int | None = None  # BEAMS
    length_penalty: float | None = None  # PENALTY
    temperature: float | None = None
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None  # 0

    def __post_init__(self) -> None:
        for name, kind, sound, what in (
            ("beams", Integral, lambda value: 1 <= value <= MOST_BEAMS, f"a whole number from 1 to {MOST_BEAMS}"),
            ("length_penalty", Real, lambda value: 0 <= value <= 10, "a number from 0 to 10"),
            ("temperature", Real, lambda value: 0 < value < math.inf, "above 0 (beams 1 takes the likeliest)"),
            ("top_k", Integral, lambda value: value >= 1, "a whole number above 0"),
            ("top_p", Real, lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("seed", Integral, lambda value: value >= 0, "0 or a whole number above"),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, kind) and sound(value)):
                raise UserError(f"{name} {value!r}: is to be {what}")
        if self.temperature is None:
            wrong, what = ("top_k", "top_p", "seed"), "is for translations that are drawn; give a temperature"
        else:
            wrong, what = ("beams", "length_penalty"), "is for a search; leave it out, or the temperature"
        for name in wrong:
            value = getattr(self, name)
            if value is not None and (name, value) != ("top_p", 1):
                raise UserError(f"{name} {value!r}: {what}")

    @property
    def scored(self) -> bool:
        return self.temperature is None

    def __call__(self, network: Translator, source: Tensor, most: list[int], numbers: list[int]) -> list[Hypothesis]:
        """One for each text of a batch. What is drawn for a text hangs on the seed and its number alone."""
        if self.temperature is None:
            beams = BEAMS if self.beams is None else self.beams
            penalty = PENALTY if self.length_penalty is None else self.length_penalty
            found = beam_search(network, source, most, beams=beams, length_penalty=penalty)
            return [several[0] for several in found]
        chances = np.zeros((len(numbers), max(most, default=0)))
        for row, number in zip(chances, numbers, strict=True):
            row[:] = np.random.Generator(np.random.PCG64([self.seed or 0, number])).random(len(row))
        drawn = sample(
            network,
            source,
            most,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            chances=torch.from_numpy(chances),
        )
        return [Hypothesis(tuple(each), 0.0, len(each) == m - 1) for each, m in zip(drawn, most, strict=True)]


def shortened(text: str, most: int = 40) -> str:
    """A text in a message."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."


def _as_texts(texts: Any) -> list[str]:
    """One text is a list of one; what is no text is a UserError that says which."""
    several = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    for i, text in enumerate(several):
        if not isinstance(text, str):
            where = f"text {i}" if isinstance(texts, Iterable) else "texts"
            raise UserError(f"{where}: is {text!r:.60}, which is no text; give a str, or a list of them")
    return several


def _checked_batch(size: Any) -> int:
    if not isinstance(size, Integral) or size < 1:
        raise UserError(f"batch_size {size!r}: is to be a whole number above 0")
    return int(size)


def relevance(network: Translator, source: Tensor, inputs: Tensor, said: Sequence[int]) -> np.ndarray:
    """(T, S): how much the logarithm of each token's probability hangs on each token of the text.

    The size of gradient times input, summed over channels (https://arxiv.org/abs/1312.6034 has the gradient alone);
    rows sum to one.
    """
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # whose recurrences go back only in training
        embedded = network.embed_source(source).detach().requires_grad_()
        scores = network.outputs(network.hidden(source, inputs, embedded)).logits[0].log_softmax(dim=-1)
        rows = []
        for place, token in enumerate(said):
            (gradient,) = torch.autograd.grad(scores[place, token], embedded, retain_graph=True)
            rows.append((gradient * embedded).sum(dim=-1).abs()[0].detach())
    table = torch.stack(rows)
    return (table / table.sum(dim=1, keepdim=True).clamp_min(1e-30)).cpu().numpy()


def open_model(
    source: str | Path, *, device: str = "auto", precision: str = "auto", notes: list[str] | None = None
) -> Model | TextModel:
    """A model of pictures or of texts, whichever it is. `notes` as of `load_network`."""
    network, card = load_network(source, notes)
    if not isinstance(network, Translator):
        return Model.of(network, card, device=device, precision=precision)
    if card.tokenizer is None:
        raise UserError(f"{source}: holds no tokenizer, without which it cannot read; get the file anew")
    tokenizer = read_tokenizer(card.tokenizer, str(source))
    check_tokenizer(network.config, tokenizer, str(source))
    place = choose_device(device)
    return TextModel(network.to(place), tokenizer, card, place)

"""A text's translation: the loss, the search, and how it is measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.base import Row
from saccade.config import RunConfig
from saccade.data.text.batches import TextTargets
from saccade.decoding import Hypothesis, beam_search, greedy
from saccade.layers.token_loss import linear_cross_entropy
from saccade.metrics.translation import Example, TranslationMetric, TranslationReport
from saccade.models.translator import TranslationOutputs, Translator, TranslatorRow
from saccade.tasks.processes import mean_over_processes
from saccade.tokenizer import Tokenizer

USUAL = 99.9  # per cent of the training pairs show how long a translation may become
FEW = 10  # tokens by which lengths are raised before they are divided: those of short texts scatter
SPARE = 5  # tokens that an expected length leaves free


@dataclass(frozen=True)
class Answer:
    """What evaluation needs of a batch."""

    losses: Float[Tensor, " B"]  # of each reference, summed over its tokens
    translations: list[Hypothesis]
    seconds: float  # that they took


class TranslationTask:
    """What the engine needs to know of translation; it knows nothing of it otherwise."""

    name = "translate"
    best = "chrf"  # as the kept model is chosen: BLEU is noise as long as hardly any four words are right
    usual_threshold: float | None = None
    class_names: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer, config: RunConfig, row: Row):
        assert isinstance(row, TranslatorRow)
        self.tokenizer, self.row = tokenizer, row
        self.label_smoothing = config.loss.label_smoothing
        self.decoding = config.decoding
        self.most = min(config.text.max_length, row.max_length)
        self.into = ""  # the language of translations, where it is known
        self.longer: float | None = None  # how much longer than their texts translations are expected to be at most

    def expect(self, lengths: Int[np.ndarray, "N 2"]) -> None:
        """From now on translations end where hardly any of a training run would go on.

        A model that has yet to learn when to end says everything up to the limit, which takes evaluations several times
        as long as they take later; what it says so far on is worth nothing. `lengths` are those of texts and their
        translations, in tokens. How many the limit ended is part of the report.
        """
        raised = lengths + FEW
        self.longer = float(np.percentile(raised[:, 1] / raised[:, 0], USUAL))

    def longest(self, length: int) -> int:
        """Of a translation, in tokens, its end included, for a text of `length` tokens."""
        most = min(self.most, 2 * length + 20)  # a translation that long repeats itself
        if self.longer is None:
            return most
        return min(most, max(2, math.ceil(self.longer * (length + FEW)) - FEW + SPARE))

    def forward(self, network: nn.Module, source: Int[Tensor, "B S"], targets: TextTargets) -> TranslationOutputs:
        """The decoder is given the reference up to each place; scores (M, V) of all places that are no padding."""
        return network(source, self.inputs(targets.tokens), targets.tokens != self.row.pad)

    def inputs(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """What the decoder is given: the start, and all but the last token."""
        return torch.cat((torch.full_like(tokens[:, :1], self.row.begin), tokens[:, :-1]), dim=1)

    def losses(self, outputs: TranslationOutputs, targets: TextTargets) -> dict[str, Tensor]:
        """Cross-entropy by token, the target smoothed over the vocabulary: https://arxiv.org/abs/1512.00567.

        Each token counts alike, whichever process has it.
        """
        wanted = targets.tokens[targets.tokens != self.row.pad]
        loss = linear_cross_entropy(
            outputs.hidden, outputs.table, outputs.bias, wanted, self.label_smoothing, outputs.precision
        )
        return {"cross_entropy": loss * (len(wanted) / mean_over_processes(len(wanted), loss.device))}

    def answer(self, network: nn.Module, source: Int[Tensor, "B S"], targets: TextTargets) -> Answer:
        model = bare(network)
        if not len(source):  # of a process that has no share of a batch
            return Answer(torch.zeros(0), [], 0.0)
        tokens = targets.tokens
        logits = model(source, self.inputs(tokens)).logits.float()
        each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        losses = each.masked_fill(tokens == self.row.pad, 0.0).sum(dim=1)
        began = time.perf_counter()
        found = self.translate(model, source)
        return Answer(losses, found, time.perf_counter() - began)

    def translate(self, model: Translator, source: Int[Tensor, "B S"]) -> list[Hypothesis]:
        most = [self.longest(length) for length in (source != self.row.pad).sum(dim=1).tolist()]
        if self.decoding.beams == 1:
            said = greedy(model, source, most)
            return [Hypothesis(tuple(each), math.nan, len(each) == m - 1) for each, m in zip(said, most, strict=True)]
        found = beam_search(model, source, most, beams=self.decoding.beams, length_penalty=self.decoding.length_penalty)
        return [hypotheses[0] for hypotheses in found]

    @staticmethod
    def things(targets: Any) -> None:
        return None

    def metric(self) -> TranslationMetric:
        beams, penalty = self.decoding.beams, self.decoding.length_penalty
        return TranslationMetric("greedy" if beams == 1 else f"{beams} beams, length penalty {penalty:g}", self.into)

    def update(self, metric: TranslationMetric, answer: Answer, targets: TextTargets) -> None:
        texts = self.tokenizer.decode([found.tokens for found in answer.translations])
        examples = [
            Example(*each) for each in zip(targets.indices, targets.sources, texts, targets.references, strict=True)
        ]
        written = sum(len(found.tokens) + 1 for found in answer.translations)
        cut = sum(found.cut for found in answer.translations)
        metric.update(examples, answer.losses.cpu().double().tolist(), targets.count, written, answer.seconds, cut)

    @staticmethod
    def scalars(report: TranslationReport) -> dict[str, float]:
        """The figures of a report that a run's table shows."""
        figures = {"loss": report.loss, "perplexity": report.perplexity, "bleu": report.bleu, "chrf": report.chrf}
        return {**figures, "cut": report.cut / report.texts}

    @staticmethod
    def threshold(report: TranslationReport) -> None:
        """None: the likeliest translation is the answer, however likely."""


def bare(network: nn.Module) -> Translator:
    """The translator inside of what was wrapped for several processes or compiled: search calls its parts."""
    while not isinstance(network, Translator):
        inner = getattr(network, "module", None) or getattr(network, "_orig_mod", None)
        assert isinstance(inner, nn.Module)
        network = inner
    return network

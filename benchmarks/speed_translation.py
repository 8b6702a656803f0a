"""A translator of ours beside transformers' Marian with the same weights: training and translating.

    python -m benchmarks.speed_translation --json benchmarks/results/speed_translation.json
    python -m benchmarks.speed_translation --only greedy --sentences 128

Both run in one process, turn by turn and in turns of order. Weights are random and the same for both; the size is that
of the opus-mt models (6 + 6 blocks of width 512, 58,101 tokens; `--vocabulary` changes the last).
Random weights do not know when to end, so each translation is made to end after as many tokens as its text has, by a
rule that both are given; texts have the lengths of Multi30k's test sentences, or of random ones where that is absent.
`given` is in the order of the file, in batches of 32; `sorted` is by length, which either could do. The tokens of both
are compared: `same` is the share of equal translations (an exact tie of two tokens may fall either way).

`train` is forward, loss and backward of batches of about 2,048 tokens of either language, without dropout and without
an optimizer; tokens are those of the translations, without padding. `memory` is what the keys and values of one text
of 512 tokens take with 1 and 4 beams.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import report
from saccade.data.text.batches import EncodedPairs, TrainPlan
from saccade.data.text.splits import open_pairs
from saccade.decoding import beam_search, greedy
from saccade.models.transformer import Transformer, TransformerRow
from saccade.models.translator import DecodingState
from saccade.weights.formats.marian import FORMATS, build_peer
from saccade.weights.formats.table import read_state

BATCH, BEAMS = 32, 4
OPUS = TransformerRow(
    width=512, heads=8, hidden=2048, encoder_depth=6, decoder_depth=6, mlp="silu", logit_bias=True, dropout=0.0,
    max_length=512, vocabulary=58101, pad=58100, begin=58100, end=0,
)  # fmt: skip
COLUMNS = {
    "name": "", "ours_s": ".2f", "rival_s": ".2f", "ratio": ".2f", "tokens": "d", "ours_tokens_s": ".0f",
    "rival_tokens_s": ".0f", "same": ".4f", "others_cores": ".2f",
}  # fmt: skip


class Timed(Transformer):
    """Ends each translation after as many tokens as its text has."""

    def begin(self, source: Tensor, beams: int = 1) -> Any:
        return Ending(super().begin(source, beams), (source != self.config.pad).sum(dim=1), self.config.end)


class Ending:
    def __init__(self, state: DecodingState, lengths: Tensor, end: int):
        self.state, self.lengths, self.end, self.time = state, lengths, end, 0

    def advance(self, tokens: Tensor) -> Tensor:
        scores = self.state.advance(tokens)
        self.time += 1
        due = self.lengths <= self.time
        scores[..., self.end] = -torch.inf
        if bool(due.any()):
            scores[due] = -torch.inf
            scores[due, :, self.end] = 0.0
        return scores

    def select(self, parents: Tensor) -> None:
        self.state.select(parents)

    def keep(self, texts: Tensor) -> None:
        self.state.keep(texts)
        self.lengths = self.lengths[texts]


def ending_rule(lengths: Tensor, beams: int, end: int) -> Any:
    """The same for transformers."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Rule(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            due = (lengths <= input_ids.shape[1]).repeat_interleave(beams)
            scores[:, end] = -torch.inf
            if bool(due.any()):
                scores[due] = -torch.inf
                scores[due, end] = 0.0
            return scores

    return LogitsProcessorList([Rule()])


def twins(row: TransformerRow) -> tuple[Timed, Any]:
    torch.manual_seed(0)
    theirs: Any = build_peer(row)
    with torch.no_grad():  # as large as trained ones, so that no two tokens are alike
        theirs.model.shared.weight.normal_(std=row.width**-0.5)
    (form,) = FORMATS
    assert form.complete is not None
    ours = Timed(row)
    ours.load_state_dict(read_state(form.complete(theirs.state_dict(), {}), form.rules(row, 0), (), "theirs"))
    return ours.eval(), theirs.eval()


def texts(row: TransformerRow, count: int, data: Path) -> list[Tensor]:
    rng = np.random.default_rng(0)
    if data.exists():
        lengths = [max(3, round(1.3 * len(text.split()))) for text in open_pairs(data, "test").sources[:count]]
    else:
        lengths = rng.integers(8, 30, count).tolist()
    return [torch.from_numpy(np.append(rng.integers(2, row.vocabulary - 2, n - 1), row.end)) for n in lengths]


def batches(sentences: list[Tensor], pad: int, ordered: bool) -> list[Tensor]:
    chosen = sorted(sentences, key=len) if ordered else sentences
    return [
        torch.nn.utils.rnn.pad_sequence(chosen[i : i + BATCH], batch_first=True, padding_value=pad)
        for i in range(0, len(chosen), BATCH)
    ]


def translate(ours: Timed, theirs: Any, kind: str, parts: list[Tensor], rounds: int) -> dict[str, Any]:
    row = ours.config
    beams = BEAMS if kind == "beam" else 1

    def own() -> list[list[int]]:
        found: list[list[int]] = []
        for part in parts:
            most = part.shape[1] + 2
            if beams == 1:
                found += greedy(ours, part, most)
            else:
                found += [list(several[0].tokens) for several in beam_search(ours, part, most, beams=beams)]
        return found

    def rival() -> list[list[int]]:
        found: list[list[int]] = []
        for part in parts:
            mask = (part != row.pad).long()
            said = theirs.generate(
                part, attention_mask=mask, num_beams=beams, do_sample=False, max_length=part.shape[1] + 3,
                bad_words_ids=[[row.pad]], decoder_start_token_id=row.begin,
                logits_processor=ending_rule(mask.sum(dim=1), beams, row.end),
            )  # fmt: skip
            found += [each[1 : each.index(row.end)] for each in said.tolist()]
        return found

    seconds, answers = turns(own, rival, rounds)
    tokens = sum(len(each) + 1 for each in answers[0])
    same = sum(one == other for one, other in zip(*answers, strict=True)) / len(answers[0])
    return {**compared(seconds, tokens), "same": same}


def turns(own: Callable[[], Any], rival: Callable[[], Any], rounds: int) -> tuple[list[list[float]], list[Any]]:
    seconds: list[list[float]] = [[], []]
    answers: list[Any] = [None, None]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            answers[which] = (own, rival)[which]()
            seconds[which].append(time.perf_counter() - start)
    return seconds, answers


def compared(seconds: list[list[float]], tokens: int) -> dict[str, Any]:
    one, other = (statistics.median(each) for each in seconds)
    return {
        "ours_s": one, "rival_s": other, "ratio": other / one, "tokens": tokens,
        "ours_tokens_s": tokens / one, "rival_tokens_s": tokens / other, "rounds": len(seconds[0]),
    }  # fmt: skip


def train(ours: Timed, theirs: Any, sentences: list[Tensor], rounds: int) -> dict[str, Any]:
    row = ours.config
    rows = [each.tolist() for each in sentences]
    encoded = EncodedPairs(rows, rows[1:] + rows[:1], row.pad)
    plan = TrainPlan(encoded.lengths, 2048, seed=0)
    chosen = [encoded.batch(indices) for indices in plan.batches(0, 3)]

    def own() -> None:
        for batch in chosen:
            tokens = batch.targets.tokens
            inputs = torch.cat((torch.full_like(tokens[:, :1], row.begin), tokens[:, :-1]), dim=1)
            where = tokens != row.pad
            loss = F.cross_entropy(ours(batch.source, inputs, where).logits, tokens[where])
            loss.backward()
            ours.zero_grad(set_to_none=True)

    def rival() -> None:
        for batch in chosen:
            tokens = batch.targets.tokens
            labels = tokens.masked_fill(tokens == row.pad, -100)
            mask = (batch.source != row.pad).long()
            theirs(input_ids=batch.source, attention_mask=mask, labels=labels).loss.backward()
            theirs.zero_grad(set_to_none=True)

    turns(own, rival, 1)
    seconds, _ = turns(own, rival, rounds)
    return compared(seconds, sum(batch.targets.count for batch in chosen))


@torch.inference_mode()
def memory(ours: Timed, beams: int) -> dict[str, Any]:
    source = torch.randint(2, ours.config.vocabulary - 2, (1, 32))
    state = Transformer.begin(ours, source, beams)
    tokens = torch.full((1, beams), ours.config.begin)
    for _ in range(511):
        state.advance(tokens)
    store = state.past.kept.numel() * state.past.kept.element_size()
    return {"tokens": 512, "translation_mb": store / 2**20, "text_mb": (state.past.bytes - store) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/multi30k"))
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="of train, greedy, beam, memory; some, with commas")
    parser.add_argument("--orders", default="given,sorted")
    parser.add_argument("--vocabulary", type=int, default=OPUS.vocabulary)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = ("train", "greedy", "beam", "memory") if options.only is None else options.only.split(",")
    last = options.vocabulary - 1
    ours, theirs = twins(replace(OPUS, vocabulary=options.vocabulary, pad=last, begin=last))
    sentences = texts(ours.config, options.sentences, options.data)
    rows: list[dict[str, Any]] = []

    def add(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        load = report.Load()
        values = measure()
        rows.append({"name": name, **values, "others_cores": load.others(), "threads": torch.get_num_threads(),
                     "versions": report.versions(("torch", "transformers"))})  # fmt: skip
        print(report.table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)

    print(report.table([], COLUMNS), flush=True)
    for kind in (part for part in parts if part in ("greedy", "beam")):
        for order in options.orders.split(","):
            made = batches(sentences, ours.config.pad, order == "sorted")
            with torch.inference_mode():
                translate(ours, theirs, kind, made[:1], 1)  # code and caches are there
                add(f"{kind}, {order}", partial(translate, ours, theirs, kind, made, options.rounds))
    if "train" in parts:
        add("train", lambda: train(ours.train(), theirs.train(), sentences, options.rounds))
        ours.eval()
    if "memory" in parts:
        for beams in (1, BEAMS):
            add(f"memory, {beams} beams", partial(memory, ours, beams))
            print(rows[-1])
    if options.json is not None:
        report.merge(options.json, rows)


if __name__ == "__main__":
    main()

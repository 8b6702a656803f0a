"""Batches of text: pairs of like lengths together, bounded by tokens, the same ones wherever the stream is entered."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from saccade.data.text.pairs import Pairs
from saccade.errors import UserError

SHORTEST = 8  # of a bucket, in tokens
STEP = 1.12  # each bucket reaches so much further than the one before
MOST = 64  # pairs that are translated at a time
POOL = 8  # batches of a bucket whose pairs are sorted by their shorter side


@dataclass(frozen=True)
class TextTargets:
    """Translations as numbers without a start, and, where they are to be compared with, as texts."""

    tokens: Tensor  # int64 (B, T)
    count: int  # tokens that are no padding
    indices: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextBatch:
    """Numbers of tokens, filled up with `pad` behind each text's end."""

    source: Tensor  # int64 (B, S)
    targets: TextTargets
    indices: Tensor  # int64 (B,), positions among the pairs
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # of text there is none

    def __len__(self) -> int:
        return len(self.source)

    def to(self, device: torch.device) -> TextBatch:
        source, tokens, indices = (
            each.to(device, non_blocking=True) for each in (self.source, self.targets.tokens, self.indices)
        )
        return replace(self, source=source, targets=replace(self.targets, tokens=tokens), indices=indices)


class EncodedPairs:
    """All texts as numbers, one behind the other."""

    def __init__(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], pad: int):
        self.pad = pad
        self.sides = tuple(_packed(side) for side in (sources, targets))
        self.lengths = np.stack([np.diff(starts) for _, starts in self.sides], axis=1)  # int64 (N, 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def holds(self, side: int, token: int) -> np.ndarray:
        """bool (N,): whether each text of a side has this token."""
        numbers, starts = self.sides[side]
        before = np.concatenate([[0], np.cumsum(numbers == token)])
        return before[starts[1:]] > before[starts[:-1]]

    def batch(self, indices: np.ndarray) -> TextBatch:
        source, tokens = (
            torch.from_numpy(_padded(numbers, starts, indices, self.pad)) for numbers, starts in self.sides
        )
        count = int(self.lengths[indices, 1].sum())
        return TextBatch(source, TextTargets(tokens, count), torch.from_numpy(indices))


def _packed(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    numbers = np.fromiter((token for text in texts for token in text), dtype=np.int32, count=int(starts[-1]))
    return numbers, starts


def _padded(numbers: np.ndarray, starts: np.ndarray, indices: np.ndarray, pad: int) -> np.ndarray:
    lengths = starts[indices + 1] - starts[indices]
    table = np.full((len(indices), int(lengths.max(initial=1))), pad, dtype=np.int64)
    for row, (i, length) in enumerate(zip(indices, lengths, strict=True)):
        table[row, :length] = numbers[starts[i] : starts[i] + length]
    return table


class TrainPlan:
    """The endless order of batches. The one with number s depends on (seed, s) and the lengths of all pairs alone.

    A bucket holds pairs whose longer side is about as long; its batches have as many pairs as fit into `tokens` of
    that side, so that every epoch has as many batches. A pair is drawn once in each. Under several processes a batch
    is a multiple of them, and what is left over of a bucket waits for another epoch.
    """

    def __init__(self, lengths: np.ndarray, tokens: int, seed: int, world: int = 1):
        longest = lengths.max(axis=1)
        if longest.max() * world > tokens:
            raise UserError(
                f"--text.batch-tokens {tokens}: the longest text alone has {longest.max()}"
                + (f", in each of {world} processes" if world > 1 else "")
                + "; allow more, or less --text.max-length"
            )
        self.lengths, self.seed, self.world = lengths, seed, world
        edges = [SHORTEST]
        while edges[-1] < longest.max():
            edges.append(int(np.ceil(STEP * edges[-1])))
        bucket = np.searchsorted(edges, longest)
        self.buckets: list[tuple[np.ndarray, int]] = []  # (pairs, how many make a batch)
        groups: list[np.ndarray] = []
        for k in range(len(edges)):
            pairs = np.flatnonzero(bucket == k)
            if groups and len(groups[-1]) < world:  # too few for a batch of all processes: they join longer ones
                pairs = np.concatenate((groups.pop(), pairs))
            groups += [pairs] if len(pairs) else []
        if len(groups) > 1 and len(groups[-1]) < world:
            groups[-2:] = [np.concatenate(groups[-2:])]
        for pairs in groups:
            self.buckets.append((pairs, max(1, tokens // int(longest[pairs].max()) // world) * world))
        self.per_epoch = sum(self._count(len(pairs), size) for pairs, size in self.buckets)
        if not self.per_epoch:
            raise UserError(f"{len(lengths)} pairs are too few for {world} processes; use fewer processes")

    def _count(self, pairs: int, size: int) -> int:
        return -(-pairs // size) if pairs % size == 0 or pairs % size >= self.world else pairs // size

    def epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch, 0]))
        batches: list[np.ndarray] = []
        for pairs, size in self.buckets:
            order = rng.permutation(pairs)
            shorter = self.lengths.min(axis=1)
            for first in range(0, len(order), size * POOL):  # little padding on the other side, and still much mixing
                pool = order[first : first + size * POOL]
                order[first : first + size * POOL] = pool[np.argsort(shorter[pool], kind="stable")]
            count = self._count(len(pairs), size)
            for part in (order[k * size : (k + 1) * size] for k in range(count)):
                batches.append(part[: len(part) // self.world * self.world])
        assert len(batches) == self.per_epoch
        return [batches[k] for k in rng.permutation(len(batches))]

    def batches(self, start: int, stop: int | None) -> Iterator[np.ndarray]:
        """Number `start`, `start` + 1, ... before `stop`; without it, for ever."""
        number = start
        while stop is None or number < stop:
            epoch, first = divmod(number, self.per_epoch)
            for indices in self.epoch(epoch)[first:]:
                if stop is not None and number >= stop:
                    return
                yield indices
                number += 1


def eval_plan(lengths: np.ndarray, tokens: int, most: int = MOST) -> list[np.ndarray]:
    """Every pair once, like lengths together, about `tokens` and at most `most` at a time, in a fixed order."""
    order = np.lexsort((lengths[:, 1], lengths[:, 0]))
    plan, first = [], 0
    while first < len(order):
        reach = np.maximum.accumulate(lengths[order[first : first + most]].max(axis=1))
        size = max(1, int(np.count_nonzero(reach * np.arange(1, len(reach) + 1) <= tokens)))
        plan.append(order[first : first + size])
        first += size
    return plan


def eval_batches(
    pairs: Pairs, encoded: EncodedPairs, tokens: int, rank: int = 0, world: int = 1, most: int = MOST
) -> Generator[TextBatch, None, None]:
    """`eval_plan` with the texts themselves, which translations are compared with; each process has its share."""
    for indices in eval_plan(encoded.lengths, tokens, most):
        own = indices[rank::world]
        batch = encoded.batch(own)
        targets = replace(
            batch.targets,
            indices=tuple(own.tolist()),
            sources=tuple(pairs.sources[i] for i in own),
            references=tuple(pairs.targets[i] for i in own),
        )
        yield replace(batch, targets=targets)

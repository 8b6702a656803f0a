"""Batches of text: bounded, complete, and the same wherever the stream is entered."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from saccade.data.text.batches import EncodedPairs, TrainPlan, eval_plan
from saccade.errors import UserError


def pairs(count: int = 300, seed: int = 0) -> EncodedPairs:
    rng = np.random.default_rng(seed)
    sides = [[list(rng.integers(1, 90, rng.integers(2, 40))) for _ in range(count)] for _ in range(2)]
    return EncodedPairs(sides[0], sides[1], pad=0)


@pytest.mark.parametrize("world", [1, 2])
def test_every_epoch_is_bounded_and_complete(world: int) -> None:
    encoded = pairs()
    plan = TrainPlan(encoded.lengths, 256, seed=1, world=world)
    for epoch in (0, 1):
        batches = plan.epoch(epoch)
        drawn = np.concatenate(batches)
        assert len(batches) == plan.per_epoch
        assert len({*drawn.tolist()}) == len(drawn)
        assert len(drawn) == 300 if world == 1 else 300 - 2 * len(plan.buckets) <= len(drawn)
        for indices in batches:
            assert len(indices) % world == 0 and len(indices)
            assert len(indices) * encoded.lengths[indices].max() <= 256
    assert [part.tolist() for part in plan.epoch(0)] != [part.tolist() for part in plan.epoch(1)]


def test_stream_is_the_same_wherever_it_is_entered() -> None:
    plan = TrainPlan(pairs().lengths, 200, seed=1)
    whole = [part.tolist() for part in plan.batches(0, 2 * plan.per_epoch + 3)]
    for start in (1, plan.per_epoch - 1, plan.per_epoch + 2):
        again = TrainPlan(pairs().lengths, 200, seed=1)
        assert [part.tolist() for part in again.batches(start, 2 * plan.per_epoch + 3)] == whole[start:]
    assert [part.tolist() for part in islice(plan.batches(0, None), 5)] == whole[:5]
    other = TrainPlan(pairs().lengths, 200, seed=2)
    assert [part.tolist() for part in other.batches(0, 5)] != whole[:5]


def test_little_padding() -> None:
    encoded = pairs(3000)
    plan = TrainPlan(encoded.lengths, 1024, seed=0)
    batches = [encoded.batch(indices) for indices in plan.epoch(0)]
    longer = [max(batch.source.shape[1], batch.targets.tokens.shape[1]) * len(batch) for batch in batches]
    assert encoded.lengths.max(axis=1).sum() / sum(longer) > 0.9


def test_batch_is_filled_up_behind_the_end() -> None:
    encoded = EncodedPairs([[5, 6, 2], [7, 2]], [[8, 2], [9, 9, 9, 2]], pad=0)
    batch = encoded.batch(np.array([1, 0]))
    assert batch.source.tolist() == [[7, 2, 0], [5, 6, 2]]
    assert batch.targets.tokens.tolist() == [[9, 9, 9, 2], [8, 2, 0, 0]] and batch.targets.count == 6
    assert batch.indices.tolist() == [1, 0] and len(batch) == 2


def test_evaluation_sees_each_once_in_one_order() -> None:
    lengths = pairs().lengths
    plan = eval_plan(lengths, 500, most=15)
    assert sorted(np.concatenate(plan).tolist()) == list(range(300))
    assert max(map(len, plan)) == 15 and all(len(p) * lengths[p].max() <= 500 for p in plan)
    assert [p.tolist() for p in plan] == [p.tolist() for p in eval_plan(lengths, 500, most=15)]


def test_a_text_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="the longest text alone has"):
        TrainPlan(pairs().lengths, 20, seed=0)


def test_the_only_pair_of_its_length_is_learnt_by_several_processes() -> None:
    lengths = np.full((41, 2), 8)
    lengths[40] = 60  # alone in its bucket
    lengths[:2] = 3  # fewer than the processes
    plan = TrainPlan(lengths, 256, seed=0, world=4)
    drawn = {int(i) for epoch in range(30) for batch in plan.epoch(epoch) for i in batch}
    assert drawn == {*range(41)}
    assert all(len(batch) % 4 == 0 for batch in plan.epoch(0))

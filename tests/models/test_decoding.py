"""Greedy, beams, sampling and streams against the plainest possible code, which keeps nothing and knows no batch."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from small_translators import SMALL
from torch.nn import functional as F

from saccade.decoding import Hypothesis, _top, beam_search, greedy, sample, stream, truncated
from saccade.models import build_network
from saccade.models.translator import Translator

MODELS = ("transformer_tiny", "pre_norm", "lstm", "gru_attention")
MOST = 5  # tokens of a translation by beams: some are cut


@lru_cache
def model_that_ends(name: str) -> Translator:
    """Half taught to say each text backwards, so that its translations differ and end at different places."""
    row = replace(SMALL[name], max_length=32)
    torch.manual_seed(0)
    model = build_network(row, 0)
    assert isinstance(model, Translator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        length = int(torch.randint(3, 9, (), generator=generator))
        words = torch.randint(3, 60, (32, length), generator=generator)
        ends = torch.full((32, 1), 2)
        source, target = torch.cat((words, ends), dim=1), torch.cat((words.flip(1), ends), dim=1)
        inputs = torch.cat((torch.ones_like(ends), target[:, :-1]), dim=1)
        loss = F.cross_entropy(model(source, inputs).logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Translator:
    return model_that_ends(request.param)


def sources(count: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 60, (count, 8), generator=generator)
    for row, length in zip(tokens, torch.randint(1, 9, (count,), generator=generator).tolist(), strict=True):
        row[length - 1] = 2
        row[length:] = 0
    return tokens


def alone(source: torch.Tensor) -> torch.Tensor:
    return source[None, source != 0]


@torch.no_grad()
def logarithms(model: Translator, source: torch.Tensor, said: list[int]) -> torch.Tensor:
    scores = model(source, torch.tensor([[1, *said]])).logits[0, -1].double()
    scores[[0, 1]] = -math.inf
    return scores.log_softmax(dim=0)


def plain_greedy(model: Translator, source: torch.Tensor, most: int) -> list[int]:
    said: list[int] = []
    while len(said) < most - 1:
        token = int(logarithms(model, source, said).argmax())
        if token == 2:
            break
        said.append(token)
    return said


def plain_beams(model: Translator, source: torch.Tensor, most: int, beams: int, penalty: float) -> list[Hypothesis]:
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    complete: list[Hypothesis] = []
    for time in range(1, most + 1):
        options = []
        for total, said in running:
            if time == most:
                options.append((total, said, 2))
            else:
                values = logarithms(model, source, said)
                options += [(total + float(value), said, token) for token, value in enumerate(values.tolist())]
        options.sort(key=lambda option: -option[0])
        options = options[: 2 * beams]
        for total, said, token in options[:beams]:
            if token == 2:
                complete.append(Hypothesis(tuple(said), total / time**penalty, cut=time == most))
        complete = sorted(complete, key=lambda each: -each.score)[:beams]
        running = [(total, [*said, token]) for total, said, token in options if token != 2][:beams]
        if not running or (len(complete) == beams and running[0][0] / time**penalty <= complete[-1].score):
            break
    return complete


def test_greedy(model: Translator) -> None:
    source = sources()
    found = greedy(model, source, 20)
    assert found == [plain_greedy(model, alone(row), 20) for row in source]
    assert len({len(each) for each in found}) > 1, "all as long: nothing was let go on the way"


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (4, 0.6), (2, 2.0)])
def test_beam_search(model: Translator, beams: int, penalty: float) -> None:
    source = sources()
    found = beam_search(model, source, MOST, beams=beams, length_penalty=penalty)
    for row, hypotheses in zip(source, found, strict=True):
        expected = plain_beams(model, alone(row), MOST, beams, penalty)
        assert [each.tokens for each in hypotheses] == [each.tokens for each in expected]
        assert [each.cut for each in hypotheses] == [each.cut for each in expected]
        for one, other in zip(hypotheses, expected, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)


def test_some_end_and_some_are_cut() -> None:
    """The tests above would prove little if all translations ended in one way."""
    found = [each for name in MODELS for some in beam_search(model_that_ends(name), sources(), MOST) for each in some]
    assert 0.1 < sum(each.cut for each in found) / len(found) < 0.9


def test_stream_is_greedy(model: Translator) -> None:
    source = sources(4)
    for row in source:
        assert list(stream(model, alone(row), 20)) == greedy(model, alone(row), 20)[0]


def test_stream_comes_token_by_token() -> None:
    """What is asked for is all that is computed."""
    model = model_that_ends("transformer_tiny")
    text = next(alone(row) for row in sources() if len(greedy(model, alone(row), 20)[0]) >= 4)
    calls = []
    model.decoder_norm.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    tokens = stream(model, text, 20)
    for count in (1, 2, 3):
        next(tokens)
        assert len(calls) == count


def test_each_token_costs_one_pass() -> None:
    model = model_that_ends("transformer_tiny")
    calls = []
    model.decoder_norm.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    longest = max(map(len, greedy(model, sources(), 20)))
    assert len(calls) == min(longest + 1, 19)


def test_nothing_to_translate(model: Translator) -> None:
    empty = torch.zeros(0, 3, dtype=torch.long)
    assert greedy(model, empty, 5) == [] and beam_search(model, empty, 5) == []
    only_end = torch.tensor([[2]])
    assert len(greedy(model, only_end, 5)) == 1 and greedy(model, only_end, 1) == [[]]


def test_sampling_follows_the_probabilities() -> None:
    model = model_that_ends("transformer_tiny")
    source = sources(1).expand(4000, -1)
    chances = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    found = sample(model, source, 2, temperature=2.0, chances=chances)
    expected = (logarithms(model, source[:1], []) / 2.0).softmax(dim=0)
    first = torch.tensor([each[0] if each else 2 for each in found])
    measured = torch.bincount(first, minlength=60) / len(first)
    assert (measured - expected).abs().max() < 0.03
    assert sample(model, source, 2, temperature=2.0, chances=chances) == found
    assert sample(model, source, 2, temperature=2.0) != found


def test_what_is_drawn_for_a_text_depends_on_no_other() -> None:
    model, source = model_that_ends("transformer_tiny"), sources()
    chances = torch.rand(len(source), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = sample(model, source, 12, temperature=2.0, chances=chances)
    assert len({*map(tuple, together)}) > 1
    for i in range(len(source)):
        assert sample(model, source[i : i + 1], 12, temperature=2.0, chances=chances[i : i + 1]) == [together[i]]
    turned = sample(model, source.flip(0), 12, temperature=2.0, chances=chances.flip(0))
    assert turned[::-1] == together


@pytest.mark.parametrize("chance", [0.0, 1 - 1e-16])
def test_nothing_is_drawn_that_may_not_be(model: Translator, chance: float) -> None:
    """Not even by the smallest and the largest number, which lie at the edges of what has a share."""
    chances = torch.full((len(sources()), 12), chance, dtype=torch.float64)
    assert sample(model, sources(), 12, top_k=1, chances=chances) == greedy(model, sources(), 12)
    pad, begin = model.config.pad, model.config.begin
    drawn = sample(model, sources(), 12, temperature=100.0, chances=chances)
    assert not {pad, begin} & {token for tokens in drawn for token in tokens}


def test_sampling_of_one_token_is_greedy(model: Translator) -> None:
    assert sample(model, sources(), 12, top_k=1) == greedy(model, sources(), 12)
    assert sample(model, sources(), 12, top_p=1e-9) == greedy(model, sources(), 12)


def test_truncation() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert truncated(scores, 2, 1.0).isfinite().tolist() == [[True, True, False, False], [False, False, True, True]]
    assert truncated(scores, None, 0.75).isfinite().tolist() == [[True, True, False, False], [False, False, True, True]]
    assert truncated(scores, None, 0.85).isfinite().sum(dim=1).tolist() == [3, 3]
    assert truncated(scores, 9, 1.0).isfinite().all()


@pytest.mark.parametrize("size", [50, 5000, 4352])
def test_highest_by_blocks(size: int) -> None:
    values = torch.randn(6, size, generator=torch.Generator().manual_seed(0))
    values[0, -3:] = torch.tensor([9.0, 8.0, 7.0])
    found, expected = _top(values, 8), values.topk(8)
    assert torch.equal(found[0], expected.values) and torch.equal(found[1], expected.indices)


@pytest.mark.parametrize("name", MODELS)
def test_each_text_has_a_limit_of_its_own(name: str) -> None:
    """One that goes on to a higher limit changes nothing for its neighbours."""
    model, source = model_that_ends(name), sources()
    limits = [2, 9, 3, 5, 4, 2, 12, 6, 3]
    assert greedy(model, source, limits) == [
        plain_greedy(model, alone(row), most) for row, most in zip(source, limits, strict=True)
    ]
    for row, most, hypotheses in zip(source, limits, beam_search(model, source, limits, beams=3), strict=True):
        expected = beam_search(model, alone(row), most, beams=3)[0]
        assert [(each.tokens, each.cut) for each in hypotheses] == [(each.tokens, each.cut) for each in expected]
        assert max(len(each.tokens) for each in hypotheses) < most

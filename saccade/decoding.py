"""From scores to text, token by token: greedy, beam search, sampling, and one text as a stream.

All of them work on many texts at once and let go of those that are finished, so that a long text costs its batch mates
nothing. What the decoder knows of the past is kept by the model (`DecodingState`), so each token costs one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.errors import UserError
from saccade.models.translator import Translator

GONE = 0.25  # share of finished texts at which they are let go: it costs a copy of what the others keep
DAMAGED = "no translation: the model's scores are no numbers; it is damaged, so get it anew"
BLOCK = 256  # of the vocabulary, of which the highest score is found first
Most = int | Sequence[int]  # tokens of a translation, its end included: for all texts or for each


@dataclass(frozen=True)
class Hypothesis:
    """A translation without its last token, which only says that it ends."""

    tokens: tuple[int, ...]
    score: float  # mean logarithm of the tokens' probabilities, by the length penalty's power of the length
    cut: bool = False  # ended by the limit, not by the model


@torch.inference_mode()
def greedy(model: Translator, source: Int[Tensor, "B S"], max_length: Most) -> list[list[int]]:
    """The most probable token each time, at most `max_length` of them, the end included."""
    return _one_by_one(model, source, max_length, lambda scores, *_: scores.argmax(dim=-1))


@torch.inference_mode()
def sample(
    model: Translator,
    source: Int[Tensor, "B S"],
    max_length: Most,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    chances: Float[Tensor, "B T"] | None = None,
) -> list[list[int]]:
    """Tokens drawn by their probabilities; only from the `top_k` most probable, and from the fewest that together have
    the probability `top_p` (https://arxiv.org/abs/1904.09751).

    `chances`: numbers from 0 to 1 that choose the token of each text at each place, so that what is drawn for a text
    depends on no other; T is at least the longest translation. Without them they are drawn here.
    """

    if chances is None:
        chances = torch.rand(len(source), max(_for_each(max_length, len(source)), default=0), dtype=torch.float64)
    wide = torch.float32 if source.device.type == "mps" else torch.float64  # which that device lacks
    known = chances.to(source.device, wide)
    divisor = min(max(temperature, 1e-30), 1e30)  # beyond, it or its inverse would be 0 or infinite in float32

    def draw(scores: Float[Tensor, "R V"], rows: Int[Tensor, " R"], time: int) -> Int[Tensor, " R"]:
        scores = scores.float()
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / divisor  # below 0, so that nothing overflows to inf
        shares = truncated(scores, top_k, top_p).softmax(dim=-1)
        below = shares.to(wide).cumsum(dim=-1)
        total = below[:, -1:]
        if not total.isfinite().all():
            raise UserError(DAMAGED)
        place = torch.minimum(known[rows, time, None] * total, total.nextafter(torch.zeros_like(total)))
        return torch.searchsorted(below, place, right=True)[:, 0]  # so that what has no share is never met

    return _one_by_one(model, source, max_length, draw)


def truncated(scores: Float[Tensor, "B V"], top_k: int | None, top_p: float) -> Float[Tensor, "B V"]:
    """-inf for all tokens that may not be drawn."""
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if top_p < 1:
        ordered, places = scores.sort(descending=True)
        shares = ordered.softmax(dim=-1)
        beyond = shares.cumsum(dim=-1) - shares >= top_p  # the first that reaches it still belongs to it
        scores = scores.masked_fill(beyond.scatter(-1, places, beyond), -math.inf)
    return scores


@torch.inference_mode()
def stream(model: Translator, source: Int[Tensor, "1 S"], max_length: int) -> Iterator[int]:
    """The tokens of `greedy`, each as soon as it is known, without the end."""
    state, tokens = model.begin(source), _beginning(model, source, 1)
    for _ in range(max_length - 1):
        token = int(_allowed(model, state.advance(tokens))[0, 0].argmax())
        if token == model.config.end:
            return
        yield token
        tokens = torch.tensor([[token]], device=source.device)


def _beginning(model: Translator, source: Tensor, beams: int) -> Int[Tensor, "B W"]:
    return torch.full((len(source), beams), model.config.begin, device=source.device)


def _allowed(model: Translator, scores: Float[Tensor, "B W V"]) -> Float[Tensor, "B W V"]:
    """Padding is never said, nor the token that translations begin with. In place."""
    row = model.config
    scores[..., row.pad] = -math.inf
    if row.begin not in (row.pad, row.end):
        scores[..., row.begin] = -math.inf
    return scores


def _for_each(max_length: Most, B: int) -> list[int]:
    return [max_length] * B if isinstance(max_length, int) else [*max_length]


def _one_by_one(
    model: Translator, source: Tensor, max_length: Most, choose: Callable[[Tensor, Tensor, int], Tensor]
) -> list[list[int]]:
    """`choose` is given the scores of the rows that are left, which texts they are of, and the place of the token."""
    B = len(source)
    limits = _for_each(max_length, B)
    found: list[list[int]] = [[] for _ in range(B)]
    if not B:
        return found
    state, tokens = model.begin(source), _beginning(model, source, 1)
    running = torch.arange(B, device=source.device)  # which text each row is of
    said = torch.full((B, max(limits)), model.config.end, device=source.device)
    most = torch.tensor(limits, device=source.device)
    open_ = torch.ones(B, dtype=torch.bool, device=source.device)
    for time in range(max(limits) - 1):  # the last token can only be the end
        chosen = choose(_allowed(model, state.advance(tokens))[:, 0], running, time)
        chosen = torch.where(open_ & (time < most[running] - 1), chosen, model.config.end)
        said[running, time] = chosen
        open_ = open_ & (chosen != model.config.end)
        left = int(open_.sum())
        if not left:
            break
        if left <= (1 - GONE) * len(running):
            rows = open_.nonzero()[:, 0]
            state.keep(rows)
            running, chosen, open_ = running[rows], chosen[rows], open_[rows]
        tokens = chosen[:, None]
    for row, tokens_of in zip(found, said.tolist(), strict=True):
        row += tokens_of[: tokens_of.index(model.config.end)]
    return found


# --- beam search -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def beam_search(
    model: Translator,
    source: Int[Tensor, "B S"],
    max_length: Most,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """The best translations of each text that `beams` parallel attempts find, best first.

    At each step the 2 W best continuations of all W beams are looked at. Those among the first W that end are complete:
    their score is the sum of logarithms divided by length ** length_penalty (that of https://arxiv.org/abs/1609.08144
    is divided by a shifted length). The W best others go on. A text is finished when it has W complete translations of
    which the worst is no worse than the best beam would be if it ended now. transformers' `generate` finds the same.
    """
    W, device = beams, source.device
    B = len(source)
    found: list[list[Hypothesis]] = [[] for _ in range(B)]
    if not B:
        return found
    state, tokens = model.begin(source, W), _beginning(model, source, W)
    limits = _for_each(max_length, B)
    running = list(range(B))  # which text each row is of
    finished = [False] * B
    sums = torch.full((B, W), -math.inf, device=device)
    sums[:, 0] = 0.0  # all beams begin alike: one of them is enough
    said = torch.empty((B, W, 0), dtype=torch.long, device=device)
    for time in range(1, max(limits)):  # the last token can only be the end
        values, parents, chosen = _best(_allowed(model, state.advance(tokens)), sums, 2 * W)
        ends = chosen == model.config.end
        for k, w in ends[:, :W].nonzero().tolist():
            if not finished[running[k]]:
                whole = said[k, int(parents[k, w])].tolist()
                found[running[k]].append(Hypothesis(tuple(whole), float(values[k, w]) / time**length_penalty))
        # the W best that do not end: there are that many, because each beam ends in one way only
        sums, order = values.masked_fill(ends, -math.inf).topk(W)
        parents, tokens = parents.gather(1, order), chosen.gather(1, order)
        said = torch.cat((said.gather(1, parents[..., None].expand(-1, -1, time - 1)), tokens[..., None]), dim=2)
        best = (sums[:, 0] / time**length_penalty).tolist()
        for k, text in enumerate(running):
            if not finished[text]:
                found[text] = _ranked(found[text])[:W]
                finished[text] = len(found[text]) == W and best[k] <= found[text][-1].score
                if not finished[text] and time == limits[text] - 1:
                    found[text] = _with_cut(
                        found[text], said[k].tolist(), sums[k].tolist(), limits[text], length_penalty
                    )
                    finished[text] = True
        left = [k for k, text in enumerate(running) if not finished[text]]
        if not left:
            return found
        state.select(parents)
        if len(left) <= (1 - GONE) * len(running):
            rows = torch.tensor(left, device=device)
            state.keep(rows)
            running = [running[k] for k in left]
            sums, tokens, said = sums[rows], tokens[rows], said[rows]
    for text in running:  # which may say no token but the end
        if not finished[text]:
            found[text] = [Hypothesis((), 0.0, cut=True)]
    return found


def _with_cut(
    found: list[Hypothesis], attempts: list[list[int]], sums: list[float], most: int, length_penalty: float
) -> list[Hypothesis]:
    """What is complete and what the limit of `most` tokens ended, best first."""
    cut = [
        Hypothesis(tuple(tokens), total / most**length_penalty, cut=True)
        for tokens, total in zip(attempts, sums, strict=True)
        if total > -math.inf
    ]
    if not found and not cut:
        raise UserError(DAMAGED)
    return _ranked([*found, *cut])[: len(attempts)]


def _ranked(hypotheses: list[Hypothesis]) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda each: -each.score)


def _best(
    scores: Float[Tensor, "B W V"], sums: Float[Tensor, "B W"], count: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"], Int[Tensor, "B K"]]:
    """The `count` best continuations of each text: their sums of logarithms, beams and tokens, best first."""
    B, W, V = scores.shape
    logarithms = scores.float().log_softmax(dim=-1)
    values, tokens = _top(logarithms.view(B * W, V), min(count, V))
    values = values.view(B, W, -1) + sums[..., None]
    values, places = values.flatten(1).topk(count)
    per_beam = tokens.shape[-1]
    return values, places // per_beam, tokens.view(B, -1).gather(1, places)


def _top(values: Float[Tensor, "R V"], count: int) -> tuple[Float[Tensor, "R K"], Int[Tensor, "R K"]]:
    """`topk`, by way of the highest value of every block: the `count` highest lie in that many blocks at most."""
    R, V = values.shape
    blocks = V // BLOCK
    if blocks < 2 * count:
        found = values.topk(count)
        return found.values, found.indices
    whole = values[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    chosen = whole.amax(dim=2).topk(count).indices  # (R, K)
    inside = whole.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1)
    places = (chosen[..., None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    rest = torch.arange(blocks * BLOCK, V, device=values.device).expand(R, -1)
    best = torch.cat((inside, values[:, blocks * BLOCK :]), dim=1).topk(count)
    return best.values, torch.cat((places, rest), dim=1).gather(1, best.indices)

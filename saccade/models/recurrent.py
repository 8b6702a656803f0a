"""Recurrent encoder-decoders: plain (https://doi.org/10.1207/s15516709cog1402_1), LSTM and GRU
(https://arxiv.org/abs/1409.3215, https://arxiv.org/abs/1406.1078), with and without additive attention
(https://arxiv.org/abs/1409.0473).

Deviation: attention does not steer the recurrence that asks for it but the one after it, as in
https://arxiv.org/abs/1609.08144, so that both recurrences run in PyTorch's fused code over all places of a text.
Without attention the second recurrence is given the encoder's last state instead, the same at every place: all that the
decoder knows of the text is one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from saccade.layers.dropout import dropout
from saccade.layers.stepping import PackedLinear
from saccade.models.translator import TranslationOutputs, Translator, TranslatorRow

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
State = tuple[Tensor, ...]  # (1, B, C) each: the hidden state, and an LSTM's cell


@dataclass(frozen=True, kw_only=True)
class RecurrentRow(TranslatorRow):
    """A row of the table of recurrent encoder-decoders."""

    family: ClassVar[str] = "recurrent"

    cell: Literal["rnn", "lstm", "gru"]
    attention: bool
    encoder_depth: int = 1  # in both directions

    @property
    def about(self) -> str:
        kind = {"rnn": "plain recurrence", "lstm": "LSTM", "gru": "GRU"}[self.cell]
        return f"{kind} of width {self.width}, {'additive' if self.attention else 'no'} attention"


RECURRENTS: dict[str, RecurrentRow] = {
    name + ("_attention" if attention else ""): RecurrentRow(
        width=256, cell=name, attention=attention, dropout=0.3, max_length=256
    )
    for name in ("rnn", "lstm", "gru")
    for attention in (False, True)
}


class AdditiveAttention(nn.Module):
    """score = v^T tanh(W query + U key), https://arxiv.org/abs/1409.0473."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(
        self,
        queries: Float[Tensor, "B T C"],
        keys: Float[Tensor, "B S C"],
        values: Float[Tensor, "B S C"],
        keep: Tensor,  # bool (B, S)
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T S"]]:
        """`keys` are `self.key(values)`, which need not be computed for each token anew."""
        scores = self.score(torch.tanh(self.query(queries)[:, :, None] + keys[:, None]))[..., 0]
        weights = scores.masked_fill(~keep[:, None], -torch.inf).softmax(dim=-1)
        return weights @ values, weights


class Recurrent(Translator):
    """Tokens (B, S) and (B, T) -> scores (B, T, V)."""

    config: RecurrentRow

    def __init__(self, row: RecurrentRow):
        super().__init__()
        if not row.vocabulary:
            raise ValueError("a translator needs a vocabulary: row.vocabulary is 0")
        if row.width % 2:
            raise ValueError(f"both directions share the width, which must be even, not {row.width}")
        C, cell = row.width, CELLS[row.cell]
        self.config = row
        self.embeddings = nn.Parameter(torch.empty(row.vocabulary, C))
        self.logit_bias = None
        between = row.dropout if row.encoder_depth > 1 else 0.0
        self.encoder = cell(
            C, C // 2, num_layers=row.encoder_depth, bidirectional=True, batch_first=True, dropout=between
        )
        self.bridge = nn.Linear(C, (2 if row.cell == "lstm" else 1) * C)
        self.decoder = cell(C, C, batch_first=True)
        self.attention = AdditiveAttention(C) if row.attention else None
        self.second = cell(2 * C, C, batch_first=True)
        self.readout = nn.Linear(3 * C, C)
        nn.init.normal_(self.embeddings, std=C**-0.5)

    def hidden(
        self, source: Int[Tensor, "B S"], inputs: Int[Tensor, "B T"], embedded: Float[Tensor, "B S C"] | None = None
    ) -> Float[Tensor, "B T C"]:
        return self._decode(source, inputs, embedded)[0]

    def _decode(
        self, source: Tensor, inputs: Tensor, embedded: Tensor | None = None
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T S"] | None]:
        memory = self.encode(source, embedded)
        return self.step(inputs, memory, self.starting(memory.summary), None)[:2]

    def embed_source(self, source: Int[Tensor, "B S"]) -> Float[Tensor, "B S C"]:
        return self._embed(source)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embeddings) * self.config.width**0.5
        return dropout(x, self.config.dropout, self.training)

    def encode(self, source: Int[Tensor, "B S"], embedded: Float[Tensor, "B S C"] | None = None) -> Memory:
        keep = source != self.config.pad
        x = self.embed_source(source) if embedded is None else embedded
        lengths = keep.sum(dim=1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, last = fused(self.encoder, packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        final = last[0] if isinstance(last, tuple) else last
        summary = torch.cat((final[-2], final[-1]), dim=-1)  # (B, C): the last state of either direction
        states = dropout(states, self.config.dropout, self.training)
        keys = states if self.attention is None else self.attention.key(states)
        return Memory(summary, states, keys, keep)

    def starting(self, summary: Float[Tensor, "B C"]) -> State:
        """The decoder's first state."""
        return tuple(part.contiguous() for part in torch.tanh(self.bridge(summary))[None].chunk(self._parts, dim=-1))

    @property
    def _parts(self) -> int:
        return 2 if self.config.cell == "lstm" else 1

    def step(
        self, tokens: Int[Tensor, "B T"], memory: Memory, first: State, second: State | None
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T S"] | None, State, State]:
        """Any number of tokens from the given states: what is said of each, what it looked at, and the new states."""
        h, first = _run(self.decoder, self._embed(tokens), first)
        if self.attention is None:
            context, weights = memory.summary[:, None].expand(-1, h.shape[1], -1), None
        else:
            context, weights = self.attention(h, memory.keys, memory.states, memory.keep)
        both = dropout(torch.cat((h, context), dim=-1), self.config.dropout, self.training)
        g, second = _run(self.second, both, second)
        x = torch.tanh(self.readout(torch.cat((h, g, context), dim=-1)))
        return dropout(x, self.config.dropout, self.training), weights, first, second

    def with_alignment(
        self, source: Int[Tensor, "B S"], inputs: Int[Tensor, "B T"]
    ) -> tuple[TranslationOutputs, Float[Tensor, "B T S"] | None]:
        hidden, weights = self._decode(source, inputs)
        return self.outputs(hidden), weights

    def begin(self, source: Int[Tensor, "B S"], beams: int = 1) -> RecurrentState:
        return RecurrentState(self, source, beams)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [self.encoder, self.decoder, self.second]

    def depth_of(self, parameter: str) -> int:
        return {"embeddings": 0, "encoder": 1, "decoder": 2, "second": 3}.get(parameter.split(".")[0], self.depth)


@dataclass(frozen=True)
class Memory:
    """What the encoder leaves to the decoder."""

    summary: Float[Tensor, "B C"]
    states: Float[Tensor, "B S C"]
    keys: Float[Tensor, "B S C"]
    keep: Tensor  # bool (B, S)

    def rows(self, chosen: Tensor) -> Memory:
        return Memory(self.summary[chosen], self.states[chosen], self.keys[chosen], self.keep[chosen])


def _run(cell: nn.Module, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """The fused recurrence; an LSTM's state is a pair, the others' a tensor."""
    given = None if state is None else state if len(state) == 2 else state[0]
    out, after = fused(cell, x, given)
    return out, after if isinstance(after, tuple) else (after,)


def fused(cell: nn.Module, x: Any, state: Any = None) -> tuple[Any, Any]:
    """`cell(x, state)`; in full precision on processors without bfloat16, for which there is no LSTM in it."""
    device = x.data.device.type
    if device != "cpu" or not torch.is_autocast_enabled(device) or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return cell(x, state)
    with torch.autocast(device, enabled=False):
        x = x._replace(data=x.data.float()) if isinstance(x, PackedSequence) else x.float()
        given = tuple(part.float() for part in state) if isinstance(state, tuple) else state
        return cell(x, given.float() if isinstance(given, Tensor) else given)


class RecurrentState:
    """All that is past is one state a beam, however long it was."""

    def __init__(self, model: Recurrent, source: Int[Tensor, "B S"], beams: int):
        self.model, self.beams = model, beams
        memory = model.encode(source)
        self.memory = memory.rows(torch.arange(len(source), device=source.device).repeat_interleave(beams))
        self.first = model.starting(self.memory.summary)
        self.second: State | None = None
        self.vocabulary = model.once(lambda model: PackedLinear(model.embeddings, None))

    def advance(self, tokens: Int[Tensor, "B W"]) -> Float[Tensor, "B W V"]:
        hidden, _, self.first, self.second = self.model.step(
            tokens.reshape(-1, 1), self.memory, self.first, self.second
        )
        return self.vocabulary(hidden.view(len(tokens), self.beams, -1))

    def select(self, parents: Int[Tensor, "B W"]) -> None:
        starts = torch.arange(len(parents), device=parents.device)[:, None] * self.beams
        self._take((starts + parents).flatten())

    def keep(self, texts: Int[Tensor, " b"]) -> None:
        rows = (texts[:, None] * self.beams + torch.arange(self.beams, device=texts.device)).flatten()
        self.memory = self.memory.rows(rows)
        self._take(rows)

    def _take(self, rows: Tensor) -> None:
        self.first = tuple(part[:, rows] for part in self.first)
        self.second = None if self.second is None else tuple(part[:, rows] for part in self.second)

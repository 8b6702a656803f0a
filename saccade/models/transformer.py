"""The Transformer as published, https://arxiv.org/abs/1706.03762: encoder, decoder, one table of tokens for all.

Deviations: sines and cosines lie in halves instead of alternating, which is a permutation of channels; and, as in
Marian (https://arxiv.org/abs/1804.00344), whose weights fit, other activations and a bias of the scores may be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from saccade.layers.dropout import dropout
from saccade.layers.positions import sinusoidal_1d
from saccade.layers.stepping import BlockStep, PackedLinear, Past
from saccade.layers.transformer import TransformerBlock, xavier
from saccade.models.translator import TranslationOutputs, Translator, TranslatorRow


@dataclass(frozen=True, kw_only=True)
class TransformerRow(TranslatorRow):
    """A row of the table of encoder-decoder Transformers."""

    family: ClassVar[str] = "transformer"

    heads: int
    hidden: int  # of feed-forward networks
    encoder_depth: int
    decoder_depth: int
    mlp: Literal["relu", "gelu", "silu"] = "relu"
    norm_first: bool = False
    norm_eps: float = 1e-5
    position: Literal["sinusoidal", "learned"] = "sinusoidal"
    scale_embeddings: bool = True  # by the root of the width
    logit_bias: bool = False

    @property
    def about(self) -> str:
        depth = f"{self.encoder_depth} + {self.decoder_depth} blocks"
        return f"{depth}, width {self.width}, {self.heads} heads, {'pre' if self.norm_first else 'post'}-norm"


TRANSFORMERS: dict[str, TransformerRow] = {
    # 2.6 M parameters with a vocabulary of 10,000: https://arxiv.org/abs/2105.14462
    "transformer_tiny": TransformerRow(
        width=128, heads=4, hidden=256, encoder_depth=4, decoder_depth=4, dropout=0.3, max_length=256
    ),
    "transformer_small": TransformerRow(
        width=256, heads=4, hidden=1024, encoder_depth=4, decoder_depth=4, dropout=0.3, max_length=256
    ),
    "transformer_base": TransformerRow(
        width=512, heads=8, hidden=2048, encoder_depth=6, decoder_depth=6, dropout=0.1, max_length=512
    ),
    "transformer_big": TransformerRow(
        width=1024, heads=16, hidden=4096, encoder_depth=6, decoder_depth=6, dropout=0.3, max_length=512
    ),
    # the forms that most opus-mt models have: https://aclanthology.org/2020.eamt-1.61
    "marian_base": TransformerRow(
        width=512,
        heads=8,
        hidden=2048,
        encoder_depth=6,
        decoder_depth=6,
        mlp="silu",
        logit_bias=True,
        dropout=0.1,
        max_length=512,
    ),
    "marian_big": TransformerRow(
        width=1024,
        heads=16,
        hidden=4096,
        encoder_depth=6,
        decoder_depth=6,
        mlp="relu",
        logit_bias=True,
        dropout=0.1,
        max_length=1024,
    ),
}


class Transformer(Translator):
    """Tokens (B, S) and (B, T) -> scores (B, T, V)."""

    config: TransformerRow

    def __init__(self, row: TransformerRow):
        super().__init__()
        if not row.vocabulary:
            raise ValueError("a translator needs a vocabulary: row.vocabulary is 0")
        C = row.width
        self.config = row
        self.embeddings = nn.Parameter(torch.empty(row.vocabulary, C))
        self.encoder = nn.ModuleList(self._block(row, cross=False) for _ in range(row.encoder_depth))
        self.decoder = nn.ModuleList(self._block(row, cross=True) for _ in range(row.decoder_depth))
        self.encoder_norm = nn.LayerNorm(C, eps=row.norm_eps) if row.norm_first else nn.Identity()
        self.decoder_norm = nn.LayerNorm(C, eps=row.norm_eps) if row.norm_first else nn.Identity()
        self.logit_bias = nn.Parameter(torch.zeros(row.vocabulary)) if row.logit_bias else None
        if row.position == "learned":
            self.encoder_table = nn.Parameter(torch.empty(row.max_length, C))
            self.decoder_table = nn.Parameter(torch.empty(row.max_length, C))
            for table in (self.encoder_table, self.decoder_table):
                nn.init.normal_(table, std=0.02)
        else:
            waves = sinusoidal_1d(row.max_length, C)
            self.register_buffer("waves", waves, persistent=False)
        nn.init.normal_(self.embeddings, std=C**-0.5)
        for module in (self.encoder, self.decoder):
            xavier(module)

    @staticmethod
    def _block(row: TransformerRow, *, cross: bool) -> TransformerBlock:
        return TransformerBlock(
            row.width,
            row.heads,
            row.hidden,
            cross=cross,
            mlp=row.mlp,
            norm_first=row.norm_first,
            norm_eps=row.norm_eps,
            dropout=row.dropout,
        )

    def hidden(
        self, source: Int[Tensor, "B S"], inputs: Int[Tensor, "B T"], embedded: Float[Tensor, "B S C"] | None = None
    ) -> Float[Tensor, "B T C"]:
        memory, keep = self.encode(source, embedded)
        x = self.embed_target(inputs)
        for block in self.decoder:
            x = self._run(partial(block, context=memory, context_bias=keep, causal=True), x)
        return self.decoder_norm(x)

    def encode(
        self, source: Int[Tensor, "B S"], embedded: Float[Tensor, "B S C"] | None = None
    ) -> tuple[Float[Tensor, "B S C"], Bool[Tensor, "B 1 1 S"]]:
        """The encoder's states, and which of them are no padding."""
        keep = (source != self.config.pad)[:, None, None]
        x = self.embed_source(source) if embedded is None else embedded
        for block in self.encoder:
            x = self._run(partial(block, bias=keep), x)
        return self.encoder_norm(x), keep

    def embed_source(self, source: Int[Tensor, "B S"]) -> Float[Tensor, "B S C"]:
        return self._embed(source, self._positions("encoder")[: source.shape[1]])

    def embed_target(self, inputs: Int[Tensor, "B T"], time: int | None = None) -> Float[Tensor, "B T C"]:
        """What the decoder begins with; with a `time`, all tokens are at that place."""
        positions = self._positions("decoder")
        return self._embed(inputs, positions[: inputs.shape[1]] if time is None else positions[time])

    def with_alignment(
        self, source: Int[Tensor, "B S"], inputs: Int[Tensor, "B T"]
    ) -> tuple[TranslationOutputs, Float[Tensor, "B T S"]]:
        """Mean over heads and over all layers but the first, which looks at words before it knows their context."""
        memory, keep = self.encode(source)
        x = self.embed_target(inputs)
        shares = []
        for block in self.decoder:
            assert isinstance(block, TransformerBlock)
            x, weights = block.with_weights(x, memory, context_bias=keep, causal=True)
            shares.append(weights.mean(dim=1))
        mean = torch.stack(shares[1:] or shares).mean(dim=0)
        return self.outputs(self.decoder_norm(x)), mean

    def begin(self, source: Int[Tensor, "B S"], beams: int = 1) -> TransformerState:
        return TransformerState(self, source, beams)

    def _positions(self, side: str) -> Float[Tensor, "N C"]:
        if self.config.position == "learned":
            return self.encoder_table if side == "encoder" else self.decoder_table
        assert isinstance(self.waves, Tensor)
        return self.waves

    def _embed(self, tokens: Int[Tensor, "B N"], positions: Float[Tensor, "*N C"]) -> Float[Tensor, "B N C"]:
        # padding learns nothing by being read; in Marian's models it also stands where a translation begins
        x = F.embedding(tokens, self.embeddings, padding_idx=self.config.pad)
        x = (x * math.sqrt(self.config.width) if self.config.scale_embeddings else x) + positions.to(x.dtype)
        return dropout(x, self.config.dropout, self.training)

    def _run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not (self.activation_checkpointing and self.training):
            return block(x)
        found = checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportCallIssue, reportArgumentType]
        assert isinstance(found, Tensor)
        return found

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [*self.encoder, *self.decoder]

    def depth_of(self, parameter: str) -> int:
        part, _, rest = parameter.partition(".")
        if part == "encoder":
            return 1 + int(rest.split(".")[0])
        if part == "decoder":
            return 1 + len(self.encoder) + int(rest.split(".")[0])
        return self.depth if part in ("decoder_norm", "logit_bias") else 0


class _Steps:
    """The decoder's weights laid out for single tokens."""

    def __init__(self, model: Transformer):
        self.blocks = [BlockStep(block) for block in model.decoder if isinstance(block, TransformerBlock)]
        self.scores = PackedLinear(model.embeddings, model.logit_bias)


class TransformerState:
    """Keys and values of the text are computed once, those of each token once; see `Past`."""

    def __init__(self, model: Transformer, source: Int[Tensor, "B S"], beams: int):
        memory, keep = model.encode(source)
        steps = model.once(_Steps)
        self.model, self.scores = model, steps.scores
        self.past = Past(steps.blocks, memory, None if bool(keep.all()) else keep, beams)
        self.time = 0

    def advance(self, tokens: Int[Tensor, "B W"]) -> Float[Tensor, "B W V"]:
        x = self.model.embed_target(tokens, self.time)
        self.time += 1
        return self.scores(self.model.decoder_norm(self.past.advance(x)))

    def select(self, parents: Int[Tensor, "B W"]) -> None:
        self.past.select(parents)

    def keep(self, texts: Int[Tensor, " b"]) -> None:
        self.past.keep(texts)

"""What every translator is, whatever its kind: a text's tokens -> scores of the next token of its translation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.layers.linear import linear
from saccade.layers.token_loss import linear_in

T = TypeVar("T")
LONGEST = 100_000  # tokens of either side; more come from damaged descriptions


@dataclass(frozen=True, kw_only=True)
class TranslatorRow(Row):
    """A row of a table of translators. The vocabulary and its steering tokens come from the tokenizer."""

    image_size: int = 0  # there are no pictures
    width: int
    dropout: float = 0.1
    max_length: int = 256  # tokens of either side
    vocabulary: int = 0
    pad: int = 0
    begin: int = 1  # the token that a translation begins with
    end: int = 2

    def __post_init__(self) -> None:
        """Rows come from files, too."""
        if not 2 <= self.max_length <= LONGEST:
            raise ValueError(f"max_length {self.max_length} is not from 2 to {LONGEST}")
        for name in STEERING[1:] if self.vocabulary else ():
            if not 0 <= getattr(self, name) < self.vocabulary:
                raise ValueError(f"{name} {getattr(self, name)} is none of {self.vocabulary} tokens")

    @property
    def stride(self) -> int:
        return 1

    def _form(self) -> dict[str, Any]:
        values = super()._form()
        return {name: value for name, value in values.items() if name not in ("max_length", *STEERING)}


STEERING = ("vocabulary", "pad", "begin", "end")


@dataclass(frozen=True)
class TranslationOutputs:
    """Scores of each token of the vocabulary at every place, or at those that were asked for.

    They are many: who can do with some at a time takes `hidden` and what it is multiplied with.
    """

    hidden: Float[Tensor, "*B C"]
    table: Float[Tensor, "V C"]
    bias: Float[Tensor, " V"] | None = None
    precision: torch.dtype | None = None  # of the products, where the model works in less than that of its weights

    @property
    def logits(self) -> Float[Tensor, "*B V"]:
        if self.precision is None:
            return linear(self.hidden, self.table, self.bias)
        return linear_in(self.precision, self.hidden, self.table, self.bias)


class DecodingState(Protocol):
    """The past of W beams for each of B texts. Nothing in it is computed twice."""

    def advance(self, tokens: Int[Tensor, "B W"]) -> Float[Tensor, "B W V"]:
        """The scores of what comes next, after one more token of every beam."""
        ...

    def select(self, parents: Int[Tensor, "B W"]) -> None:
        """Each beam goes on with the past of the named beam of its text."""

    def keep(self, texts: Int[Tensor, " b"]) -> None:
        """Only these texts go on, in this order."""


class Translator(nn.Module, ABC):
    """Tokens (B, S) of texts -> TranslationOutputs. Padding is `config.pad` and behind each text."""

    config: TranslatorRow
    activation_checkpointing: bool = False
    embeddings: nn.Parameter  # (V, C), of the translation's tokens; a token's score is its product with the last state
    logit_bias: nn.Parameter | None  # (V,)

    @abstractmethod
    def embed_source(self, source: Int[Tensor, "B S"]) -> Float[Tensor, "B S C"]:
        """What the encoder begins with."""

    @abstractmethod
    def hidden(
        self, source: Int[Tensor, "B S"], inputs: Int[Tensor, "B T"], embedded: Float[Tensor, "B S C"] | None = None
    ) -> Float[Tensor, "B T C"]:
        """At every place of the translation, from the text and the translation's tokens up to that place.

        `embedded` stands for `embed_source(source)`, for those who want gradients there.
        """

    def outputs(self, hidden: Float[Tensor, "*B C"]) -> TranslationOutputs:
        kind = hidden.device.type
        # who asks for scores may no longer be where this precision holds
        less = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        precision = torch.get_autocast_dtype(kind) if less else None
        return TranslationOutputs(hidden, self.embeddings, self.logit_bias, precision)

    def forward(
        self, source: Int[Tensor, "B S"], inputs: Int[Tensor, "B T"], where: Bool[Tensor, "B T"] | None = None
    ) -> TranslationOutputs:
        """`inputs` begin with `config.begin` and are the translation without its last token. `where`: the places whose
        scores are wanted, one after the other (M, V); padding then costs nothing in the vocabulary."""
        hidden = self.hidden(source, inputs)
        return self.outputs(hidden if where is None else hidden[where])

    @abstractmethod
    def begin(self, source: Int[Tensor, "B S"], beams: int = 1) -> DecodingState:
        """Read the texts; nothing is translated yet. For inference only."""

    def train(self, mode: bool = True) -> Self:
        _MADE.pop(self, None)  # fused optimizers change weights without counting it as a change
        return super().train(mode)

    def once(self, make: Callable[[Self], T]) -> T:
        """What `make` makes of the weights, such as copies in another layout; made anew where a weight has changed."""
        state = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        kept = _MADE.get(self)
        if kept is None or kept[0] != state:
            kept = _MADE[self] = (state, make(self))
        return kept[1]

    @abstractmethod
    def with_alignment(
        self, source: Int[Tensor, "B S"], inputs: Int[Tensor, "B T"]
    ) -> tuple[TranslationOutputs, Float[Tensor, "B T S"] | None]:
        """`forward`, and how much each place took from each token of the text; none where there is no attention."""

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The blocks in the order of computation: units of sharding and of layer-wise rates."""

    @abstractmethod
    def depth_of(self, parameter: str) -> int:
        """0 for embeddings, i + 1 for the i-th of `layers`, one more for what is after them."""

    @property
    def depth(self) -> int:
        return len(self.layers) + 1

    @staticmethod
    def in_backbone(parameter: str) -> bool:
        """There is no head to learn alone."""
        return False

    @staticmethod
    def class_tensors() -> tuple[str, ...]:
        return ()


# beside the models, so that copies and saves of them have no part in it
_MADE: WeakKeyDictionary[Translator, tuple[list[tuple[int, int]], Any]] = WeakKeyDictionary()

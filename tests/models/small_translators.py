"""A very small one of every kind of translator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from saccade.models import TRANSLATORS
from saccade.models.transformer import TransformerRow

VOCABULARY = 60
BLOCKS: dict[str, Any] = {"heads": 2, "hidden": 24, "encoder_depth": 2, "decoder_depth": 2}
SMALL = {
    name: replace(
        row,
        vocabulary=VOCABULARY,
        width=16,
        dropout=0.0,
        max_length=32,
        **(BLOCKS if isinstance(row, TransformerRow) else {}),
    )
    for name, row in TRANSLATORS.items()
    if name not in ("transformer_small", "transformer_base", "transformer_big", "marian_big")
}
_tiny = SMALL["transformer_tiny"]
assert isinstance(_tiny, TransformerRow)
SMALL["pre_norm"] = replace(_tiny, norm_first=True, mlp="silu")
SMALL["learned"] = replace(_tiny, position="learned", logit_bias=True, scale_embeddings=False)

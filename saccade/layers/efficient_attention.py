"""The forms of attention that a plain ViT can be built with, by name. docs/attention-cost.md compares their costs."""

from __future__ import annotations

from saccade.layers.kernel_attention import LinearAttention, PerformerAttention
from saccade.layers.low_rank_attention import LinformerAttention, NystromAttention, SpatialReductionAttention
from saccade.layers.mixing import Mixer
from saccade.layers.sparse_attention import LSHAttention, WindowAttention

# Parameters `qkv` and `out` are those of full attention in each form but "lsh", so weights carry over; only "linformer"
# and "spatial_reduction" add some.
ATTENTION: dict[str, type[Mixer]] = {
    "full": Mixer,
    "linear": LinearAttention,
    "performer": PerformerAttention,
    "linformer": LinformerAttention,
    "nystrom": NystromAttention,
    "lsh": LSHAttention,
    "spatial_reduction": SpatialReductionAttention,
    "window": WindowAttention,
}

"""Swin Transformer: https://arxiv.org/abs/2103.14030, and its second version: https://arxiv.org/abs/2111.09883."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.base import Backbone, Row, computed_again
from saccade.backbones.features import Features
from saccade.layers.feedforward import FeedForward
from saccade.layers.linear import Linear, linear
from saccade.layers.patches import PatchEmbed
from saccade.layers.windows import (
    ContinuousBias,
    Layout,
    Pair,
    RelativeBias,
    Tokens,
    merged,
    plain_layout,
    resize_bias_table,
    window_attention,
    window_layout,
)

CONVENTION = ("pad_first", "unshifted")  # fields of a row that matter only at sizes that windows do not divide


@dataclass(frozen=True, kw_only=True)
class SwinConfig(Row):
    """Any height and width is read. How windows meet a grid that they do not fit is where libraries differ.

    `unshifted` says where windows are not shifted. "axis": along an axis that one window covers (torchvision).
    "picture": where one window covers the height or the width (transformers, first version). "built": in stages where
    one window covers the map of a picture of `image_size` (timm, and transformers' second version).
    """

    family: ClassVar[str] = "swin"
    dim: int  # of the first stage; each further one doubles it
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]  # tokens along a side, per stage
    version: Literal[1, 2] = 1
    trained_windows: tuple[int, ...] | None = None  # version 2: of the pretraining, where they were others
    patch_size: int = 4
    mlp_ratio: float = 4.0
    pad_first: bool = True  # zeros are appended before the shift; timm appends them after it
    unshifted: Literal["axis", "picture", "built"] = "axis"
    drop_path: float = 0.0
    dropout: float = 0.0

    @property
    def stride(self) -> int:
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def about(self) -> str:
        first, last = self.windows[0], self.windows[-1]
        window = f"window {first}" if first == last else f"windows {first} to {last}"
        return f"{window}, {' + '.join(map(str, self.depths))} blocks from {self.dim}"

    def _form(self) -> dict[str, Any]:
        return {name: value for name, value in super()._form().items() if name not in CONVENTION}

    def built_grid(self, stage: int) -> int:
        """The side of a stage's map of a picture of `image_size`."""
        return -(-self.image_size // (self.patch_size * 2**stage))


T, S = (2, 2, 6, 2), (2, 2, 18, 2)


def _swin(dim: int, depths: tuple[int, ...], drop_path: float, window: int = 7, image_size: int = 224) -> SwinConfig:
    heads = tuple(dim // 32 * 2**i for i in range(4))
    return SwinConfig(
        dim=dim, depths=depths, heads=heads, windows=4 * (window,), image_size=image_size, drop_path=drop_path
    )


def _swinv2(
    dim: int, depths: tuple[int, ...], drop_path: float, window: int, image_size: int, trained: int | None = None
) -> SwinConfig:
    """A window is never larger than the map."""
    heads = tuple(dim // 32 * 2**i for i in range(4))
    return SwinConfig(
        version=2,
        dim=dim,
        depths=depths,
        heads=heads,
        windows=tuple(min(window, image_size // (4 * 2**i)) for i in range(4)),
        trained_windows=None if trained is None else (trained, trained, trained, trained // 2),
        image_size=image_size,
        drop_path=drop_path,
    )


SWIN = {
    "swin_tiny": _swin(96, T, 0.2),
    "swin_small": _swin(96, S, 0.3),
    "swin_base": _swin(128, S, 0.5),
    "swin_large": _swin(192, S, 0.2),
    "swin_base_384": _swin(128, S, 0.5, window=12, image_size=384),
    "swin_large_384": _swin(192, S, 0.2, window=12, image_size=384),
    "swinv2_tiny": _swinv2(96, T, 0.2, 8, 256),
    "swinv2_small": _swinv2(96, S, 0.3, 8, 256),
    "swinv2_base": _swinv2(128, S, 0.5, 8, 256),
    "swinv2_large": _swinv2(192, S, 0.2, 8, 256),
    "swinv2_tiny_window16": _swinv2(96, T, 0.2, 16, 256),
    "swinv2_small_window16": _swinv2(96, S, 0.3, 16, 256),
    "swinv2_base_window16": _swinv2(128, S, 0.5, 16, 256),
    "swinv2_base_window12": _swinv2(128, S, 0.2, 12, 192),
    "swinv2_large_window12": _swinv2(192, S, 0.2, 12, 192),
    "swinv2_base_window12to16": _swinv2(128, S, 0.2, 16, 256, trained=12),
    "swinv2_base_window12to24": _swinv2(128, S, 0.2, 24, 384, trained=12),
    "swinv2_large_window12to16": _swinv2(192, S, 0.2, 16, 256, trained=12),
    "swinv2_large_window12to24": _swinv2(192, S, 0.2, 24, 384, trained=12),
}


class WindowAttention(nn.Module):
    """Scaled dot products, with a learned bias per offset."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.scale = (dim // heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim)
        self.bias = RelativeBias(window, heads)
        self.out = Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "M N C"], bias: Float[Tensor, "H N N"], mask: Tensor | None
    ) -> Float[Tensor, "M N C"]:
        mixed = window_attention(self.qkv(x.flatten(0, 1)).unflatten(0, x.shape[:2]), bias, mask, self.scale)
        return self.out(mixed.flatten(0, 1)).view_as(x)


class CosineAttention(nn.Module):
    """Cosines with a learned temperature per head, and a continuous bias. Keys have no additive part."""

    def __init__(self, dim: int, heads: int, window: int, trained_window: int | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.query_value_bias = nn.Parameter(torch.zeros(2 * dim))
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), 10.0).log())
        self.bias = ContinuousBias(window, heads, trained_window)
        self.out = Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "M N C"], bias: Float[Tensor, "H N N"], mask: Tensor | None
    ) -> Float[Tensor, "M N C"]:
        of_q, of_v = self.query_value_bias.chunk(2)
        shift = torch.cat((of_q, torch.zeros_like(of_q), of_v))
        qkv = linear(x.flatten(0, 1), self.qkv.weight, shift).unflatten(0, x.shape[:2])
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # (M, N, H, D)
        temperature = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()[:, 0]  # (H, 1)
        q, k = F.normalize(q, dim=-1) * temperature.to(q.dtype), F.normalize(k, dim=-1)
        mixed = window_attention(torch.stack((q, k, v), dim=2).flatten(2), bias, mask, 1.0)
        return self.out(mixed.flatten(0, 1)).view_as(x)


MAX_LOGIT_SCALE = math.log(100)


class SwinBlock(nn.Module):
    """Attention in (shifted) windows and a feed-forward network, each with a residual connection and a norm.

    The norm comes before the work, in the second version after it. From the gather that puts tokens into windows to the
    next block's, all is done window by window: a few windows go through the whole block before the next few do, so
    that what lies between stays in a processor's cache.
    """

    def __init__(self, config: SwinConfig, stage: int, shifted: bool, drop_path: float):
        super().__init__()
        dim, self.window = config.dim * 2**stage, config.windows[stage]
        fits = config.unshifted == "built" and config.built_grid(stage) <= self.window
        self.shift = self.window // 2 if shifted and not fits else 0
        self.unshifted, self.pad_first = config.unshifted, config.pad_first
        self.norm_first = config.version == 1
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        if config.version == 1:
            self.attention = WindowAttention(dim, config.heads[stage], self.window)
        else:
            trained = None if config.trained_windows is None else config.trained_windows[stage]
            self.attention = CosineAttention(dim, config.heads[stage], self.window, trained)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * config.mlp_ratio), dropout=config.dropout)
        self._kept_bias: tuple[Any, Tensor] | None = None

    def forward(self, tokens: Tokens) -> Tokens:
        windows = self.windows(tokens.layout.batch, tokens.layout.grid, tokens.x.device)
        if windows.padding is not None:
            return self._forward_padded(tokens, windows)
        x = tokens.arranged(windows).x.view(windows.windows, windows.length, -1)  # (M, N, C)
        bias, shares = self.bias(), self._shares(windows, x)

        def whole(x: Tensor, start: int, end: int) -> Tensor:
            h = self.norm1(x) if self.norm_first else x
            h = self.attention(h, bias, windows.mask(start, end))
            h = h if self.norm_first else self.norm1(h)
            x = x + h if shares is None else torch.addcmul(x, h, shares[0, start:end])
            h = self._feed(x)
            return x + h if shares is None else torch.addcmul(x, h, shares[1, start:end])

        return Tokens(piecewise(whole, x, self._pieces(windows, x)).flatten(0, 1), windows)

    def _forward_padded(self, tokens: Tokens, windows: Layout) -> Tokens:
        """The same where windows do not fit the grid: only the attention sees, and costs, the appended zeros."""
        plain = plain_layout(windows.batch, windows.grid, tokens.x.device)
        x = tokens.arranged(plain).x
        h = Tokens(self.norm1(x) if self.norm_first else x, plain).arranged(windows).x
        h = h.view(windows.windows, windows.length, -1)
        bias = self.bias()

        def mix(h: Tensor, start: int, end: int) -> Tensor:
            h = self.attention(h, bias, windows.mask(start, end))
            return h if self.norm_first else self.norm1(h)

        h = piecewise(mix, h, self._pieces(windows, h))
        h = Tokens(h.flatten(0, 1), windows).arranged(plain).x.view(plain.windows, plain.length, -1)
        x = x.view_as(h)  # (B, h w, C)
        shares = self._shares(plain, x)
        x = x + h if shares is None else torch.addcmul(x, h, shares[0])
        h = self._feed(x)
        return Tokens((x + h if shares is None else torch.addcmul(x, h, shares[1])).flatten(0, 1), plain)

    def windows(self, batch: int, grid: Pair, device: torch.device) -> Layout:
        down, right = (0 if self.unshifted == "axis" and size <= self.window else self.shift for size in grid)
        if self.unshifted == "picture" and min(grid) <= self.window:
            down, right = 0, 0
        return window_layout(batch, grid, self.window, (down, right), pad_first=self.pad_first, device=device)

    def arrangement(self, batch: int, grid: Pair, device: torch.device) -> Layout:
        """The order in which the block takes tokens without moving them."""
        windows = self.windows(batch, grid, device)
        return windows if windows.padding is None else plain_layout(batch, grid, device)

    def bias(self) -> Float[Tensor, "H N N"]:
        """Of the attention, kept between calls in evaluation."""
        parameters = list(self.attention.bias.parameters())
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return self.attention.bias()
        key = [(p.data_ptr(), p._version, p.dtype, p.device) for p in parameters]
        if self._kept_bias is None or self._kept_bias[0] != key:
            self._kept_bias = key, self.attention.bias()
        return self._kept_bias[1]

    def train(self, mode: bool = True) -> Self:
        self._kept_bias = None  # sharded weights change without a new version
        return super().train(mode)

    def _feed(self, x: Tensor) -> Tensor:
        h = self.norm2(x) if self.norm_first else x
        h = self.mlp(h.flatten(0, 1)).view_as(x)
        return h if self.norm_first else self.norm2(h)

    def _shares(self, layout: Layout, x: Tensor) -> Tensor | None:
        """Stochastic depth: a factor per branch and window, the same for all windows of a picture."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep = torch.rand(2, layout.batch, 1, 1, device=x.device) >= self.drop_path
        return (keep.to(x.dtype) / (1.0 - self.drop_path)).repeat(1, layout.windows // layout.batch, 1, 1)

    def _pieces(self, layout: Layout, x: Tensor) -> list[Pair]:
        """The windows that go through together: as many as fit the cache, elsewhere all that share a mask."""
        if x.device.type != "cpu":
            return layout.kinds()
        widest = layout.length * self.mlp.up.out_features * x.element_size()
        # each piece reads all weights and has a gradient of them: no less than twice their size goes through at once
        size = max(1, max(CACHE, 2 * self.mlp.up.weight.numel() * x.element_size()) // widest)
        size = -(-layout.windows // -(-layout.windows // size))  # pieces of about one size
        return [(start, min(start + size, layout.windows)) for start in range(0, layout.windows, size)]


CACHE = 2**23  # bytes: the widest tensor of a piece of work stays below this, where a single window does


def piecewise(work: Callable[[Tensor, int, int], Tensor], x: Tensor, pieces: list[Pair]) -> Tensor:
    """`work` on a few windows after the other. Without gradients, no more is kept than the result."""
    if len(pieces) == 1:
        return work(x, *pieces[0])
    parts = x.split([end - start for start, end in pieces])
    if torch.is_grad_enabled():
        return torch.cat([work(part, *piece) for part, piece in zip(parts, pieces, strict=True)])
    result = torch.empty_like(x)
    for part, (start, end) in zip(parts, pieces, strict=True):
        result[start:end] = work(part, start, end)
    return result


def _one(images: Tensor) -> Tensor:
    """A black picture in the shape of none."""
    return images.new_zeros(1, *images.shape[1:])


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width. The norm comes first, in the second version last."""

    def __init__(self, dim: int, *, norm_first: bool):
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(4 * dim if norm_first else 2 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, tokens: Tokens, layout: Layout) -> Tokens:
        """Into an order of the tokens of the halved grid."""
        x = merged(tokens, layout)
        return Tokens(self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x)), layout)


class Swin(Backbone):
    """Patches -> stages of window blocks, between which patches are merged -> norm -> mean over the tokens.

    The maps are those of all stages, before the last norm. A picture that is no multiple of the patches gets zeros at
    its right and lower edge.
    """

    config: SwinConfig

    def __init__(self, config: SwinConfig):
        super().__init__()
        c = self.config = config
        stages = range(len(c.depths))
        if not len(c.depths) == len(c.heads) == len(c.windows) == len(c.trained_windows or c.windows):
            raise ValueError("depths, heads and windows must have an entry for every stage")
        self.channels = tuple(c.dim * 2**i for i in stages)
        self.strides = tuple(c.patch_size * 2**i for i in stages)
        self.summary_channels = self.channels[-1]
        self.patches = PatchEmbed(c.patch_size, c.dim)
        self.patch_norm = nn.LayerNorm(c.dim)
        total, rates = sum(c.depths), iter(range(sum(c.depths)))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                SwinBlock(c, i, shifted=j % 2 == 1, drop_path=c.drop_path * next(rates) / max(1, total - 1))
                for j in range(c.depths[i])
            )
            for i in stages
        )
        self.merges = nn.ModuleList(PatchMerging(dim, norm_first=c.version == 1) for dim in self.channels[:-1])
        self.norm = nn.LayerNorm(self.channels[-1])
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.version == 2:  # every block begins as the identity
            for block in self.layers:
                for norm in (block.norm1, block.norm2):
                    nn.init.zeros_(norm.weight)

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        H, W = images.shape[-2:]
        p = self.config.patch_size
        if H % p or W % p:
            images = F.pad(images, (0, -W % p, 0, -H % p))
        (H, W), B = images.shape[-2:], len(images)
        # the largest maps outside of the blocks: to compute them again takes a hundredth of the backward pass
        x = computed_again(self._embed, self.patches, images)
        return Tokens(x, plain_layout(B, (H // p, W // p), images.device))

    def _embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "Bhw C"]:
        return self.patch_norm(self.patches(images).permute(0, 2, 3, 1).flatten(0, 2))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        if not len(images):  # as of one, of whose gradients nothing is left
            one = self.forward(_one(images))
            return Features(tuple(each[:0] for each in one.maps), one.strides, one.summary[:0])
        maps = [stage.rows().permute(0, 3, 1, 2) for stage in self._stages(images)]
        # of the map itself, so that explanations can follow the summary back to it
        return Features(tuple(maps), self.strides, self.norm(maps[-1].permute(0, 2, 3, 1)).mean(dim=(1, 2)))

    def summary(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """`forward(images).summary`, without putting the maps in order."""
        if not len(images):
            return self.summary(_one(images))[:0]
        *_, last = self._stages(images)
        return self._pool(last)

    def _stages(self, images: Tensor) -> Iterator[Tokens]:
        tokens = self.embed(images)
        for merge, blocks in zip((None, *self.merges), self.stages, strict=True):
            assert isinstance(blocks, nn.ModuleList)
            if merge is not None:
                (B, (h, w)), first = (tokens.layout.batch, tokens.layout.grid), blocks[0]
                assert isinstance(first, SwinBlock)
                layout = first.arrangement(B, ((h + 1) // 2, (w + 1) // 2), tokens.x.device)
                largest = merge is self.merges[0]
                tokens = computed_again(merge, merge, tokens, layout) if largest else merge(tokens, layout)
            for block in blocks:
                tokens = self.run(block, tokens)
            yield tokens

    def _pool(self, tokens: Tokens) -> Float[Tensor, "B C"]:
        return Tokens(self.norm(tokens.x), tokens.layout).mean()

    @property
    def layers(self) -> Sequence[SwinBlock]:
        return [block for stage in self.stages for block in stage]  # type: ignore[union-attr]

    def depth_of(self, parameter: str) -> int:
        kind, *numbers = parameter.split(".")[:3]
        depths = self.config.depths
        if kind == "stages":
            return sum(depths[: int(numbers[0])]) + int(numbers[1]) + 1
        if kind == "merges":
            return sum(depths[: int(numbers[0]) + 1]) + 1
        return 0 if kind in ("patches", "patch_norm") else sum(depths) + 1

    def adapt(self, weights: dict[str, Tensor], row: Row) -> list[str]:
        """Bias tables of other windows are interpolated; the second version has none."""
        if not isinstance(row, SwinConfig) or self.config.version == 2:
            return []
        notes = []
        for i, (old, new) in enumerate(zip(row.windows, self.config.windows, strict=True)):
            names = [f"stages.{i}.{j}.attention.bias.table" for j in range(self.config.depths[i])]
            if old != new:
                weights.update({name: resize_bias_table(weights[name], new) for name in names if name in weights})
                notes.append(f"position biases of stage {i + 1} interpolated from windows of {old} to {new}")
        return notes

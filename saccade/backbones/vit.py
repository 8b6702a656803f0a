"""Vision Transformer: https://arxiv.org/abs/2010.11929, and its kin, which differ in rows of one table.

DeiT https://arxiv.org/abs/2012.12877, DeiT III https://arxiv.org/abs/2204.07118, DINO https://arxiv.org/abs/2104.14294,
DINOv2 https://arxiv.org/abs/2304.07193, registers https://arxiv.org/abs/2309.16588, DINOv3
https://arxiv.org/abs/2508.10104, the image towers of CLIP https://arxiv.org/abs/2103.00020 and SigLIP
https://arxiv.org/abs/2303.15343, and the small-data form CCT https://arxiv.org/abs/2104.05704.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade.backbones.base import Backbone, Row
from saccade.backbones.features import AttentionTrace, Features
from saccade.config import NetworkConfig
from saccade.errors import UserError
from saccade.layers.efficient_attention import ATTENTION
from saccade.layers.encoder import EncoderBlock, Rotary
from saccade.layers.mixing import Layout
from saccade.layers.patches import ConvStem, PatchEmbed
from saccade.layers.pooling import AttentionPooling
from saccade.layers.positions import LearnedPositions, resize_positions, rotary_2d, sinusoidal_2d
from saccade.layers.token_merging import Merged

CLASS_TOKENS = {"token": 1, "distilled": 2, "token_mean": 1}  # that a pool reads
# differ between sources and uses of one and the same model
WRITTEN_ONLY = {"resize", "norm_eps", "class_position", "merge_tokens", "merge_schedule"}


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Row):
    """`image_size` is also the grid of learned positions."""

    family: ClassVar[str] = "vit"
    dim: int
    depth: int
    heads: int
    hidden: int
    patch_size: int = 16
    stem: tuple[int, ...] = ()  # widths of a convolutional stem, each halving the resolution; empty: plain patches
    stem_repeats: tuple[int, ...] = ()
    pool: str = "token"  # or distilled, token_mean (side by side), mean, sequence, attention
    class_token: bool = False  # kept also where the pool does not read it
    norm_pooled: bool = False  # the last norm is that of the pooled vector; the tokens have none
    projection: int | None = None  # width of a last linear map without bias, as in CLIP
    position: str = "learned"
    resize: str = "antialias"  # how learned positions are brought to another grid, see `layers.positions.RESIZES`
    class_position: bool = True  # in the source, tokens without a patch have places in the table; here they are added
    registers: int = 0
    layer_scale: float | None = None
    mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    qkv_bias: bool = True
    key_bias: bool = True
    pre_norm: bool = False  # a norm before the first block, and patches without bias
    norm_eps: float = 1e-6
    attention: str = "full"  # a name of `layers.efficient_attention.ATTENTION`
    merge_tokens: int = 0  # tokens that join others in each block
    merge_schedule: Literal["constant", "decreasing"] = "constant"  # see `merges`
    drop_path: float = 0.0
    dropout: float = 0.0

    @property
    def stride(self) -> int:
        return 2 ** len(self.stem) if self.stem else self.patch_size

    @property
    def about(self) -> str:
        most = ", most in the first ones" if self.merge_schedule == "decreasing" else ""
        merging = f", {self.merge_tokens} tokens merged a block{most}" if self.merge_tokens else ""
        return f"{'conv stem' if self.stem else f'patch {self.patch_size}'}, {self.depth} x {self.dim}{merging}"

    @property
    def class_tokens(self) -> int:
        return CLASS_TOKENS.get(self.pool, int(self.class_token))

    @property
    def prefix(self) -> int:
        """Tokens without a patch, which come first."""
        return self.class_tokens + self.registers

    @property
    def merges(self) -> tuple[int, ...]:
        """Tokens that join others, block by block. Decreasing: from twice as many to none, as many in all."""
        if self.merge_schedule == "constant" or self.depth == 1:
            return self.depth * (self.merge_tokens,)
        falling = [2 * self.merge_tokens * (1 - i / (self.depth - 1)) for i in range(self.depth)]
        until = [round(sum(falling[:i])) for i in range(self.depth + 1)]  # sums are rounded, so that all of them count
        return tuple(after - before for before, after in pairwise(until))

    @property
    def side(self) -> int:
        """Of the grid of learned positions."""
        return max(1, self.image_size // self.stride)

    def changed(self, network: NetworkConfig, image_size: int | None = None) -> Self:
        if self.stem and network.patch_size is not None:
            raise UserError("network.patch_size: this model has a convolutional stem, not patches; choose a vit_ model")
        row = super().changed(network, image_size)
        if row.position == "rotary" and (row.dim // row.heads) % 4:
            raise UserError("network.position: rotary needs a head width that is a multiple of 4")
        if row.norm_pooled and row.pool in ("distilled", "token_mean"):
            raise UserError(f"network.pool: {row.pool} needs normed tokens, and this model norms what is pooled")
        if row.position == "rotary" and not ATTENTION[row.attention].takes_rotary:
            raise UserError(f"network.attention: {row.attention} takes no rotary positions; choose --network.position")
        if row.merge_tokens and row.attention != "full":
            raise UserError(f"network.merge_tokens: only with full attention, not with {row.attention}")
        return row

    def _form(self) -> dict[str, Any]:
        return {name: value for name, value in super()._form().items() if name not in WRITTEN_ONLY}


def _plain(dim: int, depth: int, heads: int, patch_size: int = 16) -> ViTConfig:
    return ViTConfig(dim=dim, depth=depth, heads=heads, hidden=4 * dim, patch_size=patch_size)


def _sizes(prefix: str, sizes: dict[str, ViTConfig], suffix: str = "") -> dict[str, ViTConfig]:
    return {f"{prefix}_{size}{suffix}": row for size, row in sizes.items()}


TINY, SMALL, BASE, LARGE = _plain(192, 12, 3), _plain(384, 12, 6), _plain(768, 12, 12), _plain(1024, 24, 16)
MEDIUM, HUGE = _plain(512, 12, 8), _plain(1280, 32, 16, patch_size=14)
GIANT = replace(_plain(1408, 40, 16, patch_size=14), hidden=6144)
GIANT_2 = replace(_plain(1536, 40, 24), hidden=4096, mlp="swiglu")


def _deit(row: ViTConfig) -> ViTConfig:
    return replace(row, pool="distilled")


def _deit3(row: ViTConfig) -> ViTConfig:
    return replace(row, layer_scale=1e-6, class_position=False)


def _dinov2(row: ViTConfig, registers: int = 0) -> ViTConfig:
    return replace(row, patch_size=14, image_size=518, layer_scale=1e-5, registers=registers)


def _dinov3(row: ViTConfig) -> ViTConfig:
    return replace(row, image_size=256, position="rotary", registers=4, layer_scale=1e-5, norm_eps=1e-5, key_bias=False)


def _siglip(row: ViTConfig, image_size: int = 224) -> ViTConfig:
    return replace(row, image_size=image_size, pool="attention", mlp="gelu_tanh")


def _clip(row: ViTConfig, patch_size: int, projection: int) -> ViTConfig:
    return replace(row, patch_size=patch_size, pre_norm=True, mlp="quick_gelu", norm_eps=1e-5, projection=projection)


VIT = {
    "vit_micro": ViTConfig(dim=128, depth=6, heads=4, hidden=512, patch_size=4, image_size=32, drop_path=0.05),
    **_sizes(
        "vit",
        {
            "tiny": TINY,
            "small": SMALL,
            "base": BASE,
            "large": LARGE,
            "huge": HUGE,
            "giant": GIANT,
            "small_8": replace(SMALL, patch_size=8),
            "base_8": replace(BASE, patch_size=8),
            "small_32": replace(SMALL, patch_size=32),
            "base_32": replace(BASE, patch_size=32),
            "large_32": replace(LARGE, patch_size=32),
        },
    ),
    **_sizes("deit", {"tiny": _deit(TINY), "small": _deit(SMALL), "base": _deit(BASE)}),
    **_sizes(
        "deit3",
        {
            "small": _deit3(SMALL),
            "medium": _deit3(MEDIUM),
            "base": _deit3(BASE),
            "large": _deit3(LARGE),
            "huge": _deit3(HUGE),
        },
    ),
    **_sizes(
        "dino",
        {
            "small": SMALL,
            "base": BASE,
            "small_8": replace(SMALL, patch_size=8),
            "base_8": replace(BASE, patch_size=8),
        },
    ),
    **_sizes(
        "dinov2",
        {"small": _dinov2(SMALL), "base": _dinov2(BASE), "large": _dinov2(LARGE), "giant": _dinov2(GIANT_2)},
    ),
    **_sizes(
        "dinov2",
        {
            "small": _dinov2(SMALL, 4),
            "base": _dinov2(BASE, 4),
            "large": _dinov2(LARGE, 4),
            "giant": _dinov2(GIANT_2, 4),
        },
        "_registers",
    ),
    **_sizes(
        "dinov3",
        {
            "small": _dinov3(SMALL),
            "small_plus": _dinov3(replace(SMALL, mlp="swiglu")),
            "base": _dinov3(BASE),
            "large": _dinov3(LARGE),
            "huge_plus": _dinov3(replace(_plain(1280, 32, 20), mlp="swiglu")),
            "7b": replace(_dinov3(_plain(4096, 40, 32)), hidden=8192, mlp="swiglu", qkv_bias=False, key_bias=True),
        },
    ),
    **_sizes(
        "siglip",
        {
            "base": _siglip(BASE),
            "large": _siglip(LARGE, 256),
            "so400m": replace(_siglip(_plain(1152, 27, 16, patch_size=14)), hidden=4304),
        },
    ),
    **_sizes(
        "clip", {"base_32": _clip(BASE, 32, 512), "base_16": _clip(BASE, 16, 512), "large_14": _clip(LARGE, 14, 768)}
    ),
    "cct_nano": ViTConfig(
        dim=192,
        depth=4,
        heads=3,
        hidden=384,
        stem=(64, 128),
        stem_repeats=(1, 2),
        pool="sequence",
        image_size=32,
        drop_path=0.1,
    ),
    "cct_small": ViTConfig(
        dim=192,
        depth=4,
        heads=4,
        hidden=384,
        stem=(32, 64, 128),
        stem_repeats=(0, 1, 1),
        pool="sequence",
        image_size=128,
        drop_path=0.1,
    ),
    "cct_base": ViTConfig(
        dim=384,
        depth=14,
        heads=6,
        hidden=1152,
        stem=(64, 128, 256, 384),
        pool="sequence",
        image_size=224,
        drop_path=0.1,
    ),
}


class ViT(Backbone):
    """Patches (or a stem) -> [class tokens, registers, patches] -> pre-norm blocks -> norm -> pooling.

    `embed`, `blocks` and `norm` are the parts that other models (mask transformers, detectors) take.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__()
        c = self.config = config
        self.prefix = c.prefix
        self.channels, self.strides = (c.dim,), (c.stride,)
        pooled = c.dim * (2 if c.pool in ("distilled", "token_mean") else 1)
        self.summary_channels = c.projection or pooled
        plain = PatchEmbed(c.patch_size, c.dim, bias=not c.pre_norm) if not c.stem else None
        self.patches = plain or ConvStem(c.stem, c.dim, c.stem_repeats)
        self.class_token = nn.Parameter(torch.empty(c.class_tokens, c.dim)) if c.class_tokens else None
        self.registers = nn.Parameter(torch.empty(c.registers, c.dim)) if c.registers else None
        self.positions = LearnedPositions((c.side, c.side), c.dim, c.resize) if c.position == "learned" else None
        self.pre_norm = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.pre_norm else None
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks = nn.ModuleList(
            EncoderBlock(
                c.dim,
                c.heads,
                c.hidden,
                mlp=c.mlp,
                norm_eps=c.norm_eps,
                qkv_bias=c.qkv_bias,
                key_bias=c.key_bias,
                layer_scale=c.layer_scale,
                drop_path=rate,
                dropout=c.dropout,
                attention=c.attention,
                layout=Layout((c.side, c.side), self.prefix),
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.pooling: nn.Linear | AttentionPooling | None = None
        if c.pool == "sequence":
            self.pooling = nn.Linear(c.dim, 1, bias=False)
        elif c.pool == "attention":
            self.pooling = AttentionPooling(c.dim, c.heads, c.hidden, mlp=c.mlp, norm_eps=c.norm_eps)
        self.projection = nn.Linear(pooled, c.projection, bias=False) if c.projection else None
        self._initialise()

    def _initialise(self) -> None:
        parts = [self.blocks, self.pooling] if isinstance(self.pooling, AttentionPooling) else [self.blocks]
        for module in (module for part in parts for module in part.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.class_token, self.registers):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B N C"], tuple[int, int]]:
        """Tokens with their positions, and the grid of the patch tokens."""
        H, W = images.shape[-2:]
        stride = self.config.stride
        if H % stride or W % stride:
            raise ValueError(f"image of {H}x{W} pixels: height and width must be multiples of {stride}")
        maps = self.patches(images)  # (B, C, h, w)
        grid = (maps.shape[2], maps.shape[3])
        x = maps.flatten(2).transpose(1, 2)
        if self.positions is not None:
            x = x + self.positions(grid)
        elif self.config.position == "sinusoidal":
            x = x + sinusoidal_2d(grid, self.config.dim, device=x.device).to(x.dtype)
        front = [t.to(x.dtype).expand(len(x), -1, -1) for t in (self.class_token, self.registers) if t is not None]
        x = torch.cat([*front, x], dim=1) if front else x
        return x if self.pre_norm is None else self.pre_norm(x), grid

    def rotary(
        self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor] | None:
        if self.config.position != "rotary":
            return None
        exact = torch.promote_types(dtype, torch.float32)
        return rotary_2d(grid, self.config.dim // self.config.heads, prefix=self.prefix, device=device, dtype=exact)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        x, grid = self._encode(images)
        x = self._norm_tokens(x)
        maps = x[:, self.prefix :].transpose(1, 2).unflatten(2, grid)
        return Features((maps,), self.strides, self._summarise(x))

    def summary(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """`forward(images).summary` for less: of the last block only the class tokens, where they are the summary."""
        alone = self.config.class_tokens if self.config.pool in ("token", "distilled") else None
        return self._summarise(self._norm_tokens(self._encode(images, last_queries=alone)[0]))

    def trace(self, images: Float[Tensor, "B 3 H W"]) -> AttentionTrace:
        """The attention weights of every block and of the pooling."""
        x, grid = self.embed(images)
        rotary = self.rotary(grid, x.device, x.dtype)
        weights, merged, merges = [], Merged.none_of(x), self.config.merge_tokens > 0
        for block, count in zip(self.blocks, self.config.merges, strict=True):
            assert isinstance(block, EncoderBlock)
            if merges:
                more = {"count": count, "prefix": self.prefix, "rotary": rotary}
                x, merged, block_weights = block.merging_with_weights(x, merged, **more)
            else:
                x, block_weights = block.with_weights(x, rotary=rotary, layout=Layout(grid, self.prefix))
            weights.append(block_weights)
        x = merged.unmerge(x) if merges else x
        return AttentionTrace(tuple(weights), self._shares(self._norm_tokens(x)), self.prefix, grid)

    def _encode(self, images: Tensor, last_queries: int | None = None) -> tuple[Tensor, tuple[int, int]]:
        x, grid = self.embed(images)
        rotary = self.rotary(grid, x.device, x.dtype)
        if self.config.merge_tokens:
            return self._encode_merging(x, rotary, last_queries), grid
        layout = Layout(grid, self.prefix)
        for i, block in enumerate(self.blocks):
            queries = last_queries if i == len(self.blocks) - 1 else None
            x = self.run(partial(block, queries=queries, rotary=rotary, layout=layout), x)
        return x, grid

    def _encode_merging(self, x: Tensor, rotary: Rotary | None, last_queries: int | None) -> Tensor:
        """Through the blocks with ever fewer tokens; at the end each original token has the one that it went into."""
        merged = Merged.none_of(x)
        for i, (block, count) in enumerate(zip(self.blocks, self.config.merges, strict=True)):
            assert isinstance(block, EncoderBlock)
            queries = last_queries if i == len(self.blocks) - 1 else None
            settings = {"count": count, "prefix": self.prefix, "queries": queries, "rotary": rotary}
            x, merged = self.run(partial(block.merging, **settings), x, merged)
        return x if last_queries is not None else merged.unmerge(x)

    def _norm_tokens(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        return x if self.config.norm_pooled else self.norm(x)

    def _summarise(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B C"]:
        pooled = self._pool(x)
        if self.config.norm_pooled:
            pooled = self.norm(pooled)
        return pooled if self.projection is None else self.projection(pooled)

    def _pool(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B C"]:
        if self.config.pool in ("token", "distilled"):
            return x[:, : self.config.class_tokens].flatten(1)
        patches = x[:, self.prefix :]
        if isinstance(self.pooling, AttentionPooling):
            return self.pooling(patches)
        if self.pooling is not None:
            return (self.pooling(patches).softmax(dim=1) * patches).sum(dim=1)
        mean = patches.mean(dim=1)
        return torch.cat((x[:, 0], mean), dim=1) if self.config.pool == "token_mean" else mean

    def _shares(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N"]:
        """Of each token in the summary; they sum to one."""
        B, N, _ = x.shape
        classes, patches = x.new_zeros(B, self.prefix), x.new_full((B, N - self.prefix), 1.0 / (N - self.prefix))
        if isinstance(self.pooling, AttentionPooling):
            patches = self.pooling.with_weights(x[:, self.prefix :])[1]
        elif self.pooling is not None:
            patches = self.pooling(x[:, self.prefix :]).softmax(dim=1)[..., 0]
        of_classes = {"token": 1.0, "distilled": 1.0, "token_mean": 0.5}.get(self.config.pool, 0.0)
        if of_classes:
            classes[:, : self.config.class_tokens] = of_classes / self.config.class_tokens
        return torch.cat((classes, (1.0 - of_classes) * patches.detach()), dim=1)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def depth_of(self, parameter: str) -> int:
        if parameter.startswith("blocks."):
            return int(parameter.split(".")[1]) + 1
        stem = ("patches.", "class_token", "registers", "positions.", "pre_norm.")
        return 0 if parameter.startswith(stem) else len(self.blocks) + 1

    def adapt(self, weights: dict[str, Tensor], row: Row) -> list[str]:
        table = weights.get("positions.table")
        if table is None or self.positions is None or not isinstance(row, ViTConfig):
            return []
        old, new = (row.side, row.side), self.positions.grid
        if old == new or table.ndim != 2 or len(table) != row.side**2:
            return []
        weights["positions.table"] = resize_positions(table, old, new, self.positions.resize)
        return [f"positions interpolated from {old[0]}x{old[1]} to {new[0]}x{new[1]}"]

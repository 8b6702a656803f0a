"""Vision Transformer: https://arxiv.org/abs/2010.11929, and its small-data form CCT: https://arxiv.org/abs/2104.05704."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade.backbones.base import Backbone, Row
from saccade.backbones.features import AttentionTrace, Features
from saccade.config import NetworkConfig
from saccade.errors import UserError
from saccade.layers.encoder import EncoderBlock
from saccade.layers.patches import ConvStem, PatchEmbed
from saccade.layers.positions import LearnedPositions, rotary_2d, sinusoidal_2d


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
    pool: str = "token"
    position: str = "learned"
    registers: int = 0
    layer_scale: float | None = None
    mlp: str = "gelu"
    drop_path: float = 0.0
    dropout: float = 0.0

    @property
    def stride(self) -> int:
        return 2 ** len(self.stem) if self.stem else self.patch_size

    @property
    def about(self) -> str:
        return f"{'conv stem' if self.stem else f'patch {self.patch_size}'}, {self.depth} x {self.dim}"

    def changed(self, network: NetworkConfig, image_size: int | None = None) -> Self:
        if self.stem and network.patch_size is not None:
            raise UserError("network.patch_size: this model has a convolutional stem, not patches; choose a vit_ model")
        row = super().changed(network, image_size)
        if row.position == "rotary" and (row.dim // row.heads) % 4:
            raise UserError("network.position: rotary needs a head width that is a multiple of 4")
        return row


def _plain(dim: int, depth: int, heads: int, patch_size: int = 16) -> ViTConfig:
    return ViTConfig(dim=dim, depth=depth, heads=heads, hidden=4 * dim, patch_size=patch_size)


VIT = {
    "vit_micro": ViTConfig(dim=128, depth=6, heads=4, hidden=512, patch_size=4, image_size=32, drop_path=0.05),
    "vit_tiny": _plain(192, 12, 3),
    "vit_small": _plain(384, 12, 6),
    "vit_base": _plain(768, 12, 12),
    "vit_large": _plain(1024, 24, 16),
    "vit_huge": _plain(1280, 32, 16, patch_size=14),
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
    """Patches (or a stem) -> [class token, registers, patches] -> pre-norm blocks -> norm -> pooling.

    `embed`, `blocks` and `norm` are the parts that other models (mask transformers, detectors) take.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        c = self.config = config
        self.channels, self.strides, self.summary_channels = (c.dim,), (c.stride,), c.dim
        self.prefix = (c.pool == "token") + c.registers
        self.patches = ConvStem(c.stem, c.dim, c.stem_repeats) if c.stem else PatchEmbed(c.patch_size, c.dim)
        self.class_token = nn.Parameter(torch.empty(1, c.dim)) if c.pool == "token" else None
        self.registers = nn.Parameter(torch.empty(c.registers, c.dim)) if c.registers else None
        side = max(1, c.image_size // c.stride)
        self.positions = LearnedPositions((side, side), c.dim) if c.position == "learned" else None
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        self.blocks = nn.ModuleList(
            EncoderBlock(
                c.dim, c.heads, c.hidden, mlp=c.mlp, layer_scale=c.layer_scale, drop_path=rate, dropout=c.dropout
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.pooling = nn.Linear(c.dim, 1, bias=False) if c.pool == "sequence" else None
        self._initialise()

    def _initialise(self) -> None:
        for module in self.blocks.modules():
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
        return torch.cat([*front, x], dim=1) if front else x, grid

    def rotary(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor] | None:
        if self.config.position != "rotary":
            return None
        return rotary_2d(grid, self.config.dim // self.config.heads, prefix=self.prefix, device=device)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        x, grid = self._encode(images)
        x = self.norm(x)
        maps = x[:, self.prefix :].transpose(1, 2).unflatten(2, grid)
        return Features((maps,), self.strides, self._pool(x)[0])

    def summary(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """`forward(images).summary` for less: with a class token, the last block computes that token alone."""
        if self.config.pool != "token":
            return self._pool(self.norm(self._encode(images)[0]))[0]
        return self.norm(self._encode(images, last_queries=1)[0])[:, 0]

    def trace(self, images: Float[Tensor, "B 3 H W"]) -> AttentionTrace:
        """The attention weights of every block and of the pooling."""
        x, grid = self.embed(images)
        rotary = self.rotary(grid, x.device)
        weights = []
        for block in self.blocks:
            assert isinstance(block, EncoderBlock)
            x, block_weights = block.with_weights(x, rotary=rotary)
            weights.append(block_weights)
        return AttentionTrace(tuple(weights), self._pool(self.norm(x))[1], self.prefix, grid)

    def _encode(self, images: Tensor, last_queries: int | None = None) -> tuple[Tensor, tuple[int, int]]:
        x, grid = self.embed(images)
        rotary = self.rotary(grid, x.device)
        for i, block in enumerate(self.blocks):
            queries = last_queries if i == len(self.blocks) - 1 else None
            x = self.run(block, x, queries=queries, rotary=rotary)
        return x, grid

    def _pool(self, x: Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"]]:
        """The summary, and the share of each token in it."""
        B, N, _ = x.shape
        share = x.new_zeros(B, N)
        if self.config.pool == "token":
            share[:, 0] = 1.0
            return x[:, 0], share
        patches = x[:, self.prefix :]
        if self.pooling is None:
            share[:, self.prefix :] = 1.0 / patches.shape[1]
            return patches.mean(dim=1), share
        weights = self.pooling(patches).softmax(dim=1)  # (B, N, 1)
        share[:, self.prefix :] = weights[..., 0].detach()
        return (weights * patches).sum(dim=1), share

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def depth_of(self, parameter: str) -> int:
        if parameter.startswith("blocks."):
            return int(parameter.split(".")[1]) + 1
        return (
            0 if parameter.startswith(("patches.", "class_token", "registers", "positions.")) else len(self.blocks) + 1
        )

"""The plain ViT in windows of LW-DETR, https://arxiv.org/abs/2406.03459, and RF-DETR, https://arxiv.org/abs/2511.09554.

Most blocks attend within windows, a few over the whole picture. From the first block to the last, tokens lie window
after window, so that a block of one kind hands them to one of the other as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade.backbones.base import Backbone, Row
from saccade.backbones.features import Features
from saccade.layers.encoder import EncoderBlock
from saccade.layers.patches import PatchEmbed
from saccade.layers.positions import LearnedPositions

WRITTEN_ONLY = {"resize", "norm_eps"}  # differ between sources and uses of one and the same model


@dataclass(frozen=True, kw_only=True)
class WindowedViTConfig(Row):
    """`grid` is the side of the table of positions, which is brought to the grid of every picture."""

    family: ClassVar[str] = "windowed_vit"
    image_size: int = 640
    dim: int
    depth: int
    heads: int
    hidden: int
    patch_size: int = 16
    grid: int
    windows: int = 4  # along each side of the picture
    whole: tuple[int, ...]  # blocks that attend to the whole picture, counted from 0
    taken: tuple[int, ...]  # after so many blocks there is a map; the last one after all of them
    class_token: bool = False  # one in each window, all of which begin the same
    norm: bool = False  # of every map
    resize: str = "bicubic"  # how positions are brought to another grid, see `layers.positions.RESIZES`
    layer_scale: float | None = None
    mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    key_bias: bool = True
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    dropout: float = 0.0

    @property
    def stride(self) -> int:
        """All windows of a picture have one shape."""
        return self.patch_size * self.windows

    @property
    def about(self) -> str:
        windows = f"{self.windows} x {self.windows} windows"
        return f"patch {self.patch_size}, {self.depth} x {self.dim}, {windows} but in {len(self.whole)} blocks"

    def _form(self) -> dict[str, Any]:
        return {name: value for name, value in super()._form().items() if name not in WRITTEN_ONLY}


class WindowedViT(Backbone):
    """Patches with positions -> windows -> pre-norm blocks -> maps of the picture from some of them.

    Stochastic depth drops windows in blocks that look at windows, and pictures in those that look at the picture.
    """

    config: WindowedViTConfig

    def __init__(self, config: WindowedViTConfig):
        super().__init__()
        c = self.config = config
        if list(c.taken) != sorted({*c.taken}) or not c.taken or c.taken[0] < 1 or c.taken[-1] != c.depth:
            raise ValueError(f"maps after {c.taken} blocks: numbers must rise, up to that of all blocks, {c.depth}")
        self.channels, self.strides = (c.dim,) * len(c.taken), (c.patch_size,) * len(c.taken)
        self.summary_channels = c.dim
        self.patches = PatchEmbed(c.patch_size, c.dim)
        self.positions = LearnedPositions((c.grid, c.grid), c.dim, c.resize)
        self.class_token = nn.Parameter(torch.empty(1, c.dim)) if c.class_token else None
        self.blocks = nn.ModuleList(
            EncoderBlock(
                c.dim,
                c.heads,
                c.hidden,
                mlp=c.mlp,
                norm_eps=c.norm_eps,
                key_bias=c.key_bias,
                layer_scale=c.layer_scale,
                drop_path=c.drop_path * i / max(1, c.depth - 1),
                dropout=c.dropout,
            )
            for i in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.norm else None
        self._initialise()

    def _initialise(self) -> None:
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        x, grid = self.embed(images)
        (BW, n, _), B = x.shape, len(images)
        maps: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = x.view(B, -1, self.config.dim) if i in self.config.whole else x.view(BW, n, self.config.dim)
            x = self.run(block, x)
            if i + 1 in self.config.taken:
                maps.append(self._map(x.view(B, -1, n, self.config.dim), grid))
        return Features(tuple(maps), self.strides, maps[-1].mean(dim=(2, 3)))

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "V n C"], tuple[int, int]]:
        """The tokens of each window, windows of a picture row by row; and the grid of the picture's patches."""
        c = self.config
        H, W = images.shape[-2:]
        if H % c.stride or W % c.stride:
            raise ValueError(f"image of {H}x{W} pixels: height and width must be multiples of {c.stride}")
        maps = self.patches(images)  # (B, C, h, w)
        grid = (maps.shape[2], maps.shape[3])
        x = maps.permute(0, 2, 3, 1) + self.positions(grid).unflatten(0, grid)  # (B, h, w, C)
        x = x.unflatten(2, (c.windows, -1)).unflatten(1, (c.windows, -1)).transpose(2, 3)  # (B, W, W, h / W, w / W, C)
        x = x.reshape(len(images) * c.windows**2, -1, c.dim)
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        return x, grid

    def _map(self, x: Float[Tensor, "B V n C"], grid: tuple[int, int]) -> Float[Tensor, "B C h w"]:
        """Of the picture, from its V windows."""
        W = self.config.windows
        if self.class_token is not None:
            x = x[:, :, 1:]
        if self.norm is not None:
            x = self.norm(x)
        x = x.unflatten(2, (grid[0] // W, grid[1] // W)).unflatten(1, (W, W))  # (B, W, W, h / W, w / W, C)
        return x.transpose(2, 3).reshape(len(x), *grid, -1).permute(0, 3, 1, 2)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def depth_of(self, parameter: str) -> int:
        if parameter.startswith("blocks."):
            return int(parameter.split(".")[1]) + 1
        return len(self.blocks) + 1 if parameter.startswith("norm.") else 0

"""Linear layers through the library that is fast on the processor at hand.

PyTorch multiplies float32 matrices with MKL, which gives AMD's processors code of the generation before AVX-512. Its
library for convolutions, oneDNN, does not, and a linear layer is a convolution of width one: there, twice as fast
(measured: 200 and 420 GFLOP/s on two cores). The sums are the same but for their order.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 40  # rows: below, bringing the weights into a convolution's order costs what it gains
SMALL = 20480  # numbers in an input: up to here, PyTorch takes no oneDNN for a convolution
EVEN = 16  # rows: oneDNN may take eight times as long to sum gradients of weights over other numbers than multiples
# numbers in the weights for each row: from here on, oneDNN's sums of gradients over the rows take up to twelve times as
# long as the same products put as a layer, and a copy of the weights for each thread
LARGE = 2000
# means nothing to kernels of one place; but with it PyTorch takes oneDNN also where it has one thread
DILATION = [2, 2]


class Linear(nn.Linear):
    """`nn.Linear`, through `linear`."""

    def forward(self, input: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return linear(input, self.weight, self.bias)


def linear(x: Float[Tensor, "*B I"], weight: Float[Tensor, "O I"], bias: Tensor | None = None) -> Float[Tensor, "*B O"]:
    """`F.linear`."""
    if x.device.type != "cpu" or not _as_convolution(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, weight, bias)):
        out = _Linear.apply(rows, weight, bias)
    else:
        out = _convolve(rows, weight, bias)
    return out.view(*x.shape[:-1], -1)  # type: ignore[union-attr]


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not products_are_slow():
        return False
    # of one sample, so that its batch mates do not choose the library for it; who has no samples gives rows alone
    numbers = (x[:1] if x.dim() > 2 else x).numel()
    return x.dtype == weight.dtype == torch.float32 and numbers > max(SMALL, FEW * x.shape[-1] - 1)


@lru_cache(maxsize=1)
def products_are_slow() -> bool:
    """Whether this is a processor of AMD with AVX-512, and PyTorch has both libraries."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return False


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        upstream = gradients[0].contiguous()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if not of_weight:
            shifts = upstream.sum(dim=0) if of_bias else None
            return _of_input(upstream, x, weight) if of_x else None, None, shifts
        # In the order in which less lies about at once: for the gradient of `x`, oneDNN brings the weights into an
        # order of its own, and sums over many rows are held once for each thread.
        if weight.numel() < LARGE * len(x):
            gradient_of_weight, shifts = _of_rows(upstream, x, weight, of_bias)
            return _of_input(upstream, x, weight) if of_x else None, gradient_of_weight, shifts
        gradient_of_x = _of_input(upstream, x, weight) if of_x else None
        return gradient_of_x, _of_few_rows(upstream, x), upstream.sum(dim=0) if of_bias else None


def _of_input(upstream: Float[Tensor, "M O"], x: Float[Tensor, "M I"], weight: Tensor) -> Float[Tensor, "M I"]:
    return _rows(_differentiate(upstream, x, weight, [True, False, False])[0])


def _of_few_rows(upstream: Float[Tensor, "M O"], x: Float[Tensor, "M I"]) -> Float[Tensor, "O I"]:
    """The gradient of the weights, as if it were that of the input of a layer whose weights are `x`."""
    return _of_input(upstream.T.contiguous(), upstream.new_empty(upstream.shape[1], x.shape[1]), x)


def _of_rows(
    upstream: Float[Tensor, "M O"], x: Float[Tensor, "M I"], weight: Tensor, of_bias: bool
) -> tuple[Float[Tensor, "O I"], Tensor | None]:
    """The gradients of the weights and the bias."""
    even = len(x) - len(x) % EVEN
    _, of_kernels, shifts = _differentiate(upstream[:even], x[:even], weight, [False, True, of_bias])
    of_weight = of_kernels.view_as(weight)
    if even < len(x):
        of_weight.addmm_(upstream[even:].T, x[even:])
        shifts = shifts + upstream[even:].sum(dim=0) if of_bias else None
    return of_weight, shifts if of_bias else None


def _differentiate(upstream: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """As PyTorch's own backward pass of the convolution: of the input, the kernels and the shifts."""
    return torch.ops.aten.convolution_backward(
        _map(upstream), _map(x), _kernels(weight), [len(weight)],
        [1, 1], [0, 0], DILATION, False, [0, 0], 1, wanted,
    )  # fmt: skip


def _convolve(x: Float[Tensor, "M I"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "M O"]:
    return _rows(F.conv2d(_map(x), _kernels(weight), bias, dilation=DILATION))


# all in channels-last order, in which nothing has to be moved


def _map(x: Float[Tensor, "M C"]) -> Float[Tensor, "1 C M 1"]:
    """A picture of one column."""
    return x.view(1, len(x), 1, -1).permute(0, 3, 1, 2)


def _rows(x: Float[Tensor, "1 C M 1"]) -> Float[Tensor, "M C"]:
    return x.permute(0, 2, 3, 1).reshape(x.shape[2], -1)


def _kernels(weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I 1 1"]:
    return weight.contiguous().view(len(weight), 1, 1, -1).permute(0, 3, 1, 2)

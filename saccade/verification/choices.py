"""Detectors of two stages choose the surest of many places. Rounding may choose another of two that are about as sure,
and then all answers depart, though nothing is wrong. So one side chooses, and the other is asked whether it could have
chosen the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOPK = (torch.topk, Tensor.topk)


class Choices:
    """What `topk` chose, call after call. `limit`: of the difference between what is sure and what is as sure."""

    def __init__(self, limit: float):
        self.limit = limit
        self.made: list[Tensor] = []

    def noted(self) -> AbstractContextManager[Any]:
        """Within, choices are made freely and remembered."""
        return _Watched(self._note)

    def repeated(self) -> AbstractContextManager[Any]:
        """Within, the same are made again where they could have been made."""
        made = iter(self.made)

        def repeat(values: Tensor, own: Any, dim: int) -> Any:
            index = next(made, None)
            if index is None or index.shape != own.indices.shape or int(index.max()) >= values.shape[dim]:
                return own
            others = values.gather(dim, index)
            scale = max(1.0, float(own.values.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()))
            same = (others == own.values) | ((others - own.values).abs() <= self.limit * scale)
            return torch.return_types.topk((others, index)) if same.all() else own

        return _Watched(repeat)

    def _note(self, values: Tensor, own: Any, dim: int) -> Any:
        self.made.append(own.indices)
        return own


class _Watched(TorchFunctionMode):
    def __init__(self, watch: Callable[[Tensor, Any, int], Any]):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in TOPK:
            return result
        values = kwargs.get("input", args[0] if args else None)
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return self.watch(values, result, dim)

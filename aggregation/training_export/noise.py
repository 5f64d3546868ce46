"""Dropout whose randomness is an input: what a step computes depends on its inputs alone.

Eager torch and the exported graph are given the same noise, so they can be compared, and a node draws it by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class FedNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """While entered, every draw of dropout takes the next tensor of `noise` (uniform in [0, 1), float32).

    Without `noise` it draws as always, and `shapes` lists what was drawn.
    """

    def __init__(self, noise: Sequence[Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor here
        self._noise = None if noise is None else iter(noise)
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.bernoulli_.float:
            drawn, keep = args
            return drawn.copy_(self._kept(drawn, keep, drawn.dtype))
        if func is aten.native_dropout.default and args[2] is not False:
            x, p, _ = args
            mask = self._kept(x, 1.0 - p, torch.bool)
            return x * mask * (1.0 / (1.0 - p)), mask
        return func(*args, **kwargs)

    def _kept(self, like: Tensor, keep: float, dtype: torch.dtype) -> Tensor:
        self.shapes.append(tuple(like.shape))
        noise = torch.rand(like.shape) if self._noise is None else next(self._noise)
        return (noise < keep).to(dtype)

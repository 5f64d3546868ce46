"""Max pooling over windows that do not overlap, as comparisons of strided parts: in ONNX Runtime that is faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedtide.aggregation.training_export.taps import taps

_MOST_PARTS = 9
_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


class PooledByParts(TorchFunctionMode):
    """While entered, `max_pool1d` and `max_pool2d` are done by parts where that gives the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        axes = {"max_pool1d": 1, "max_pool2d": 2}.get(getattr(func, "__name__", "").lstrip("_"))
        if axes is not None:
            window = _window(axes, {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs})
            if window is not None:
                x = args[0] if args else kwargs["input"]
                return _FirstMaximum.apply(x, window)  # type: ignore[no-untyped-call]  # torch has no types here
        return func(*args, **kwargs)


def _window(axes: int, given: dict[str, Any]) -> tuple[int, ...] | None:
    """The window, if windows stand side by side and nothing else is asked for."""

    def each(value: Any, default: int) -> tuple[int, ...]:
        found = [default] if value is None or value == [] else value
        numbers = tuple(found) if isinstance(found, Sequence) else (int(found),)
        return numbers * axes if len(numbers) == 1 else numbers

    window = each(given["kernel_size"], 1)
    stride = window if given.get("stride") in (None, (), []) else each(given["stride"], 1)
    plain = not given.get("ceil_mode") and not given.get("return_indices")
    apart = (
        stride == window and set(each(given.get("padding"), 0)) == {0} and set(each(given.get("dilation"), 1)) == {1}
    )
    return window if plain and apart and math.prod(window) <= _MOST_PARTS else None


class _FirstMaximum(torch.autograd.Function):
    """Of equal values the first one gets the gradient, as in torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[int, ...]) -> Tensor:
        parts = _parts(x, window)
        most = parts[0]
        for part in parts[1:]:
            most = torch.maximum(most, part)
        ctx.window, ctx.shape = window, x.shape
        ctx.save_for_backward(most, *parts)
        return most

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        most, *parts = ctx.saved_tensors
        taken = parts[0] == most
        spread = [grads[0] * taken.to(grads[0].dtype)]
        for part in parts[1:]:
            here = part == most
            spread.append(grads[0] * (here & ~taken).to(grads[0].dtype))
            taken = taken | here
        return _joined(spread, ctx.window, ctx.shape), None


def _parts(x: Tensor, window: tuple[int, ...]) -> list[Tensor]:
    """One tensor for each place in the window."""
    first = x.dim() - len(window)
    counts = [x.shape[axis] // size for axis, size in enumerate(window, start=first)]
    spans = [
        [(o, o + (count - 1) * size + 1, size) for o in range(size)] for size, count in zip(window, counts, strict=True)
    ]
    return taps(x, first, spans)


def _joined(parts: list[Tensor], window: tuple[int, ...], shape: Sequence[int]) -> Tensor:
    """The inverse of `_parts`; what no window covers is 0."""
    for axis, size in zip(range(-1, -1 - len(window), -1), reversed(window), strict=True):
        groups = [parts[begin : begin + size] for begin in range(0, len(parts), size)]
        parts = [torch.stack(group, dim=axis).flatten(axis - 1, axis) for group in groups]
    (whole,) = parts
    missing = [shape[axis] - whole.shape[axis] for axis in range(-1, -1 - len(window), -1)]
    pads = [n for rest in missing for n in (0, rest)]
    return torch.ops.aten.constant_pad_nd(whole, pads, 0.0) if any(pads) else whole

"""Operators that we write in ONNX more cheaply than torch's exporter does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op


def translations() -> dict[Any, Callable[..., Any]]:
    return {torch.ops.aten.max_pool2d_with_indices.default: max_pool2d_with_indices}


def max_pool2d_with_indices(
    x: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[Any, Any]:
    """torch counts within a plane, ONNX over the whole tensor (MaxPool, opset 12: `Indices`).

    The exporter pools twice more to find out the difference.
    """
    pads = [*padding, *padding] if len(padding) == 2 else [padding[0]] * 4
    values, places = op.MaxPool(
        x,
        ceil_mode=int(ceil_mode),
        dilations=list(dilation) * (2 // len(dilation)),
        kernel_shape=list(kernel_size),
        pads=pads,
        strides=list(stride or kernel_size),
    )
    plane = op.ReduceProd(op.Shape(x, start=2), keepdims=0)
    return values, op.Mod(places, plane)

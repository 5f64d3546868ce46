"""Backward operators that have neither a core decomposition nor an ONNX translation, in terms of those that have.

Cases that are not covered raise NotImplementedError with the operator's name; `tracing` raises NotExportable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from fedtide.aggregation.training_export.taps import taps

aten = torch.ops.aten

Decompositions = dict[Any, Callable[..., Any]]


def decompositions() -> Decompositions:
    """Core ATen's, and ours."""
    own: Decompositions = {
        aten.convolution_backward.default: convolution_backward,
        aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
        aten.avg_pool2d_backward.default: avg_pool2d_backward,
        aten.threshold_backward.default: threshold_backward,
    }
    # ONNX Runtime normalises batches in inference only.
    normal = get_decompositions([aten._native_batch_norm_legit, aten.native_batch_norm_backward])
    return {**core_aten_decompositions(), **normal, **own}


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution for (input, weight, bias), each only if `output_mask` asks for it.

    For the input: the transposed convolution. For the weight: patches of the input times the gradient, which is one
    matrix product (Dumoulin and Visin 2016, https://arxiv.org/abs/1603.07285, chapter 4).
    """
    if transposed:
        raise NotImplementedError("aten.convolution_backward of a transposed convolution")
    axes = list(range(2, x.dim()))
    for_input = for_weight = for_bias = None
    if output_mask[0]:
        reached = [
            (grad.shape[a] - 1) * stride[a - 2] - 2 * padding[a - 2] + dilation[a - 2] * (weight.shape[a] - 1) + 1
            for a in axes
        ]
        missing = [x.shape[a] - reached[a - 2] for a in axes]
        for_input = aten.convolution(grad, weight, None, stride, padding, dilation, True, missing, groups)
    if output_mask[1]:
        for_weight = _weight_gradient(grad, x, weight.shape, stride, padding, dilation, groups)
    if output_mask[2]:
        for_bias = grad.sum([0, *axes])
    return for_input, for_weight, for_bias


def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    # Channels first: then one product adds up the batch as well.
    out, lead = shape[0], x.transpose(0, 1)
    pads = [p for axis in reversed(padding) for p in (axis, axis)]
    padded = aten.constant_pad_nd(lead, pads, 0.0) if any(pads) else lead
    spans = [
        [(o * d, o * d + (count - 1) * step + 1, step) for o in range(k)]
        for k, d, step, count in zip(shape[2:], dilation, stride, grad.shape[2:], strict=True)
    ]
    rows = [tap.reshape(x.shape[1], 1, -1) for tap in taps(padded, 2, spans)]
    patches, flat = torch.cat(rows, 1), grad.movedim(1, -1)
    if groups == 1:
        return torch.mm(patches.flatten(0, 1), flat.reshape(-1, out)).t().reshape(list(shape))
    apart = flat.reshape(-1, groups, out // groups).transpose(0, 1)
    found = torch.bmm(patches.reshape(groups, -1, patches.shape[2]), apart)
    return found.transpose(1, 2).reshape(list(shape))


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """ReLU's gradient as a product: ONNX Runtime's Where is several times slower."""
    return grad * (x > threshold).to(grad.dtype)


def max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Each gradient goes to where its maximum was; only windows that overlap have to be added up."""
    apart = all(s >= (k - 1) * d + 1 for k, s, d in zip(kernel_size, stride or kernel_size, dilation, strict=True))
    flat, places, values = torch.zeros_like(x).flatten(-2), indices.flatten(-2), grad.flatten(-2)
    put = torch.scatter if apart else torch.scatter_add
    return put(flat, -1, places, values).reshape(x.shape)


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Each gradient goes to its window in equal parts: a transposed convolution, channel by channel."""
    if ceil_mode or (any(padding) and not count_include_pad):
        raise NotImplementedError("aten.avg_pool2d_backward with ceil_mode, or without count_include_pad")
    step = list(stride) or list(kernel_size)
    share = 1.0 / (divisor_override or math.prod(kernel_size))
    ones = torch.full((1, 1, *kernel_size), share, dtype=grad.dtype, device=grad.device)
    flat = grad.reshape(-1, 1, *grad.shape[-2:])
    missing = [x.shape[a - 2] - ((grad.shape[a - 2] - 1) * step[a] - 2 * padding[a] + kernel_size[a]) for a in range(2)]
    spread: Tensor = aten.convolution(flat, ones, None, step, list(padding), [1, 1], True, missing, 1)
    return spread.reshape(x.shape)

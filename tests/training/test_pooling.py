"""Pooling by parts is torch's pooling, also where several values are the largest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from fedtide.aggregation.training_export.pooling import PooledByParts


@pytest.mark.parametrize(
    ("pool", "shape", "options"),
    [
        (functional.max_pool2d, (2, 3, 8, 6), {"kernel_size": 2}),
        (functional.max_pool2d, (2, 3, 7, 9), {"kernel_size": (3, 2), "stride": (3, 2)}),
        (torch.max_pool2d, (2, 3, 7, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
        (torch.max_pool1d, (2, 3, 11), {"kernel_size": 2}),
        (functional.max_pool1d, (2, 3, 11), {"kernel_size": 3, "dilation": 2}),
    ],
)
def test_values_and_gradients_are_those_of_torch(pool: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    x = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    found = []
    for by_parts in (False, True):
        given = x.clone().requires_grad_()
        if by_parts:
            with PooledByParts():
                pooled = pool(given, **options)
        else:
            pooled = pool(given, **options)
        torch.autograd.backward((pooled * torch.arange(pooled.numel()).reshape(pooled.shape)).sum())
        found.append((pooled.detach(), given.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])

"""An app that is too large for its machine is told from one that fails."""

from __future__ import annotations

import pytest
import torch

from fedtide.aggregation.worker import is_out_of_memory


@pytest.mark.parametrize(
    ("exc", "wanted"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("out of memory"), False),
        (ValueError("x"), False),
    ],
)
def test_whether_a_larger_machine_would_help(exc: Exception, wanted: bool) -> None:
    assert is_out_of_memory(exc) is wanted

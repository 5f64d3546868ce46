"""Updates that were trained from an older model, brought to the present one.

FedBuff (Nguyen et al. 2022, https://arxiv.org/abs/2106.06639) adds the discounted *differences* of
stale updates to the present model. Flower's strategies average whole models; so a stale model is
replaced by present + weight * (stale - its base): whatever the strategy, averaging these adds the
discounted differences.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Message


def rebase(message: Message, base: ArrayRecord, present: ArrayRecord, weight: float) -> None:
    """Replace the model in `message`, which was trained from `base`; integer tensors stay as they are.

    Args:
        weight: in (0, 1], the discount of the difference.
    """
    (name,) = message.content.array_records
    returned = message.content.array_records[name]
    arrays = {}
    for key, array in returned.items():
        value = array.numpy()
        if value.dtype.kind == "f":
            moved = present[key].numpy() + weight * (value.astype(np.float64) - base[key].numpy())
            arrays[key] = Array(np.asarray(moved, value.dtype))
        else:
            arrays[key] = array
    message.content[name] = ArrayRecord(arrays)

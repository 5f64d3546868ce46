"""The node's half of SCAFFOLD on plain arrays: https://arxiv.org/abs/1910.06378, algorithm 1 with option II."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def own_control(control: Mapping[str, Any], kept: Mapping[str, Any]) -> Arrays:
    """c_i: the node's stored control variate, zero where none is stored."""
    return {k: kept.get(k, np.zeros_like(v)) for k, v in control.items()}


def correction(control: Mapping[str, Any], own: Mapping[str, Any]) -> Arrays:
    """c - c_i: what is added to each gradient."""
    return {k: control[k] - own[k] for k in control}


def renewed(
    control: Mapping[str, Any],
    own: Mapping[str, Any],
    came: Mapping[str, Any],
    went: Mapping[str, Any],
    steps: int,
    rate: float,
) -> Arrays:
    """The new c_i, after `steps` steps of plain SGD at `rate` from the received model to the returned one."""
    new = {k: own[k] - control[k] + (came[k] - went[k]) / (steps * rate) for k in control}
    return {k: np.asarray(v, control[k].dtype) for k, v in new.items()}

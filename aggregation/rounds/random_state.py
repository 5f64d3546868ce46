"""The random generators that strategies draw node samples from, as data."""

from __future__ import annotations

import json
import random

import numpy as np


def capture() -> str:
    """The state of `random` and of numpy's global generator, as JSON."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return json.dumps({"random": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]})


def restore(text: str) -> None:
    """Put both generators back to a captured state."""
    state = json.loads(text)
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), position, has_gauss, cached))

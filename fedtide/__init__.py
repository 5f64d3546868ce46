"""fedtide: event-driven federated learning from cloud to edge.

The import root. Its packages are links to the directories beside this one; see docs/decisions/0018-one-import-root.md.
"""

import os as _os
from typing import Any as _Any

# Libraries that report to their makers do not, in any process of ours or one that we start. ONNX Runtime asks when it
# is loaded: it would write a device's id into the home folder, and queue events for a host of its maker.
for _name, _value in (
    ("ORT_DISABLE_TELEMETRY", "1"),
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("DO_NOT_TRACK", "1"),
):
    _os.environ.setdefault(_name, _value)


def __getattr__(name: str) -> _Any:
    """`fedtide.Client`: the client for notebooks, loaded when it is asked for."""
    if name == "Client":
        from fedtide.console.notebook import Client

        return Client
    raise AttributeError(f"module 'fedtide' has no attribute {name!r}")

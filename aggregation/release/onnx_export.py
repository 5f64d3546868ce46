"""From a run's global model to ONNX: calls the app's export hook and proves the result.

The hook is `export(arrays, context, onnx_path) -> dict` with sample `inputs` and the `outputs`
its own framework gives for them; ONNX Runtime must agree before anything is published.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context
from pydantic import ValidationError

from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.flower.apps import AppDescription
from fedtide.fabric.plans.release import Export
from fedtide.fabric.tensors.frame import Tensor

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest absolute difference between ONNX Runtime and the app's framework that is accepted."""


class ExportDiffers(FedtideError):
    """The ONNX graph does not compute what the app's framework computes."""


@dataclass(frozen=True, slots=True)
class Exported:
    onnx: bytes
    smoke: list[Tensor]
    export: Export
    max_abs_diff: float


def export(app: AppDescription, app_dir: Path, arrays: ArrayRecord, context: Context, work_dir: Path) -> Exported:
    """Run the hook that the app names and check its graph.

    Raises:
        ConfigError: the hook is missing, raised, or returned something else than promised.
        ExportDiffers: ONNX Runtime's outputs are further than TOLERANCE from the expected ones.
    """
    assert app.export is not None
    where = f"export hook {app.export}"
    path = work_dir / "model.onnx"
    hook = flower.load_component(app.export, app_dir)
    try:
        returned = hook(arrays, context, path)
    except Exception as exc:  # an app's hook may raise anything
        raise ConfigError(where, f"raised {type(exc).__name__}: {exc}") from exc
    if not isinstance(returned, dict) or not path.is_file():
        raise ConfigError(where, "must write the ONNX file and return a dict", "See docs/apps.md")
    inputs, outputs = _arrays(where, returned, "inputs"), _arrays(where, returned, "outputs")
    try:
        described = Export.model_validate({k: v for k, v in returned.items() if k not in ("inputs", "outputs")})
    except ValidationError as exc:
        first = exc.errors()[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))}", first["msg"]) from exc
    diff = _difference(where, path, inputs, outputs)
    if not diff <= TOLERANCE:
        raise ExportDiffers(f"{where}: ONNX Runtime differs by {diff:.2e}, more than {TOLERANCE:.0e}")
    smoke = [Tensor.of(f"in.{k}", v) for k, v in inputs.items()] + [
        Tensor.of(f"out.{k}", v) for k, v in outputs.items()
    ]
    return Exported(path.read_bytes(), smoke, described, diff)


def _arrays(where: str, returned: dict[str, Any], key: str) -> dict[str, Any]:
    arrays = returned.get(key)
    if not isinstance(arrays, dict) or not arrays:
        raise ConfigError(f"{where}: {key}", "must map each name to a sample array")
    return {str(k): np.asarray(v) for k, v in arrays.items()}


def _difference(where: str, path: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> float:
    try:
        import onnxruntime  # only now: it starts threads, and aggregators are forked from a process that has loaded us

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(list(outputs), inputs)
    except Exception as exc:  # onnxruntime raises its own untyped errors
        raise ConfigError(where, f"ONNX Runtime cannot run the graph: {exc}") from exc
    return max(
        float(np.max(np.abs(np.asarray(f, np.float64) - np.asarray(e, np.float64)), initial=0.0))
        for f, e in zip(found, outputs.values(), strict=True)
    )

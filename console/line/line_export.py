"""The line as an ONNX graph: y = x * slope + offset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from flwr.app import ArrayRecord, Context
from onnx import TensorProto, helper, numpy_helper


def export(arrays: ArrayRecord, context: Context, onnx_path: Path) -> dict[str, Any]:
    held = {name: arrays[name].numpy() for name in ("slope", "offset")}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in ("x", "y"))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "slope"], ["scaled"]), helper.make_node("Add", ["scaled", "offset"], ["y"])],
        "line",
        [x],
        [y],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), onnx_path)
    sample = np.array([[-1], [0], [1]], np.float32)
    return {"inputs": {"x": sample}, "outputs": {"y": sample @ held["slope"] + held["offset"]}}

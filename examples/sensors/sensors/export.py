"""How this app says "this is my ONNX export and this is my preprocessing"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context

from sensors import data, model


def export(arrays: ArrayRecord, context: Context, onnx_path: Path) -> dict[str, Any]:
    """Requests carry windows in sensor units; the node scales the axes as training did."""
    net = model.make(0)
    net.load_state_dict(arrays.to_torch_state_dict())
    net.eval()
    windows, _ = data.of_people(data.TEST_SUBJECTS)
    sample = torch.from_numpy(data.normalise(windows[:8]))
    torch.onnx.export(
        net,
        (sample,),
        str(onnx_path),
        input_names=["window"],
        output_names=["logits"],
        dynamic_axes={"window": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,
    )
    with torch.no_grad():
        expected = net(sample)
    return {
        "inputs": {"window": sample.numpy()},
        "outputs": {"logits": expected.numpy()},
        "preprocessing": [
            {"input": "window", "steps": [{"op": "normalize", "mean": [0.0] * data.AXES, "std": data.SCALE}]}
        ],
        "labels": list(data.LABELS),
    }

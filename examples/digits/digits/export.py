"""How this app says "this is my ONNX export and this is my preprocessing"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context

from digits import data, model


def export(arrays: ArrayRecord, context: Context, onnx_path: Path) -> dict[str, Any]:
    """Requests carry raw grey values 0..255; the node scales them as training did."""
    net = model.make(0)
    net.load_state_dict(arrays.to_torch_state_dict())
    net.eval()
    _, _, images, _ = data.load(int(context.run_config["seed"]))
    sample = torch.from_numpy(images[:8])
    torch.onnx.export(
        net,
        (sample,),
        str(onnx_path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,
    )
    with torch.no_grad():
        expected = net(sample)
    return {
        "inputs": {"image": sample.numpy()},
        "outputs": {"logits": expected.numpy()},
        "preprocessing": [{"input": "image", "steps": [{"op": "scale", "factor": 1 / 255}]}],
        "labels": [str(digit) for digit in range(data.CLASSES)],
    }

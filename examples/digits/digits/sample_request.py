"""Prints an Open Inference Protocol v2 request with one real test digit in raw grey values.

python -m digits.sample_request [INDEX]
"""

from __future__ import annotations

import json
import sys

from digits import data


def main() -> None:
    index = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    _, _, images, _ = data.load(1)
    grey = (images[index] * 255).round().reshape(-1).tolist()
    tensor = {"name": "image", "shape": [1, 1, 28, 28], "datatype": "FP32", "data": grey}
    print(json.dumps({"inputs": [tensor]}))


if __name__ == "__main__":
    main()

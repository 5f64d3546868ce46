"""The baseline: the same network and training on the pooled data. Prints one JSON line.

python -m digits.centralised EPOCHS
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

from digits import data, model


def main() -> None:
    config = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    seed = int(config["seed"])
    images, labels, test_images, test_labels = data.load(seed)
    net = model.make(seed)
    model.train(
        net,
        images,
        labels,
        epochs=int(sys.argv[1]),
        batch=int(config["batch-size"]),
        lr=float(config["learning-rate"]),
        momentum=float(config["momentum"]),
        seed=seed,
    )
    loss, accuracy = model.evaluate(net, test_images, test_labels)
    print(json.dumps({"loss": loss, "accuracy": accuracy, "samples": len(labels)}))


if __name__ == "__main__":
    main()

"""Three clouds of points; each node has its own. numpy only."""

import numpy as np

from edge_agent.data_source import Columns


def of_node(node, run):
    generator = np.random.default_rng(int(node["partition-id"]))
    labels = generator.integers(0, 3, 50)
    points = np.eye(3, 4)[labels] + generator.normal(0, 0.4, (50, 4))
    return Columns({"point": points.astype(np.float32), "label": labels})

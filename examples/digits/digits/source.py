"""A node's own digits as a data source: numpy only."""

from __future__ import annotations

from collections.abc import Mapping

from digits import data
from fedtide.edge_agent.samples.source import Columns

Config = Mapping[str, bool | int | float | str]


def of_node(node: Config, run: Config) -> Columns:
    images, labels, _, _ = data.load(int(run["seed"]))
    mine = data.partition(
        labels, int(node["partition-id"]), int(node["num-partitions"]), float(run["dirichlet-alpha"]), int(run["seed"])
    )
    return Columns({"image": images[mine], "label": labels[mine]})

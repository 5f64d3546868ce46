"""The recordings of a node's own people as a data source: numpy only."""

from __future__ import annotations

from collections.abc import Mapping

from fedtide.edge_agent.samples.source import Columns
from sensors import data

Config = Mapping[str, bool | int | float | str]


def of_node(node: Config, run: Config) -> Columns:
    windows, labels = data.of_node(int(node["partition-id"]), int(node["num-partitions"]))
    return Columns({"window": data.normalise(windows), "label": labels})

"""Flower's node config of one node: labels of its Kubernetes node, a file on the machine, and what all agents share."""

from __future__ import annotations

from pathlib import Path

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.identity.cluster_node import ClusterNode, describe
from fedtide.edge_agent.identity.node_config import FILE, node_config


def _config(folder: Path, **shared: int) -> AgentConfig:
    return AgentConfig(node="n1", region="eu", nats_url="nats://127.0.0.1:4222", data_dir=folder, node_config=shared)


def test_labels_of_the_node_are_numbers_booleans_and_texts() -> None:
    labels = {"partition-id": "3", "rate": "0.5", "has-gpu": "true", "site": "shop-7"}
    node = {"metadata": {"labels": {f"config.fedtide.dev/{k}": v for k, v in labels.items()}}, "spec": {}}
    assert describe(node).node_config == {"partition-id": 3, "rate": 0.5, "has-gpu": True, "site": "shop-7"}


def test_the_file_goes_before_labels_and_the_configuration_before_both(tmp_path: Path) -> None:
    cluster = ClusterNode(node_config={"partition-id": 1, "site": "a", "zone": "z"})
    (tmp_path / FILE).write_text('partition-id = 2\nsite = "b"\n')
    assert node_config(_config(tmp_path, **{"partition-id": 3}), cluster) == {
        "partition-id": 3,
        "site": "b",
        "zone": "z",
    }


def test_a_file_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("partition-id = [")
    assert node_config(_config(tmp_path), ClusterNode()) == {}

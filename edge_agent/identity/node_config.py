"""What apps find in `context.node_config` on this node: Flower's node config, from where a fleet can be told apart.

Later ones go before earlier ones:

1. labels of the Kubernetes node: `config.fedtide.dev/partition-id=3` is `partition-id`, the number 3
2. `node-config.toml` in the agent's data folder, which on k3s is a folder of the machine
3. `node_config` of the agent's configuration, which all agents of a DaemonSet share
"""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.identity.cluster_node import ClusterNode
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.flower.apps import flatten
from fedtide.fabric.strict import ConfigValues

log = logging.getLogger(__name__)

FILE = "node-config.toml"


def node_config(config: AgentConfig, cluster: ClusterNode) -> ConfigValues:
    """The node config now. A file that cannot be read is logged, and left out."""
    return {**cluster.node_config, **_of_file(config.data_dir / FILE), **config.node_config}


def _of_file(file: Path) -> ConfigValues:
    try:
        return flatten(tomllib.loads(file.read_text(encoding="utf-8")), str(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, ConfigError) as exc:
        log.error("node_config.not_read", extra={"file": str(file), "reason": str(exc)})
        return {}

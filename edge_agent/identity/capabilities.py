"""What this node can do, read from the machine."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.identity.cluster_node import ClusterNode
from fedtide.edge_agent.identity.node_config import node_config
from fedtide.edge_agent.sandbox.levels import level_of
from fedtide.fabric.messages.heartbeat import Capabilities
from fedtide.fabric.messages.protocol import OURS
from fedtide.fabric.plans.windows import zone
from fedtide.fabric.tensors.codecs import KINDS

log = logging.getLogger(__name__)

MOST_PACKAGES = 300
"""Of more it tells none: the coordinator keeps them for every node."""
_TRAINING_EXTRAS = ("flwr", "torch", "sklearn", "tensorflow", "jax", "xgboost")


def collect(config: AgentConfig, inference_url: str, cluster: ClusterNode) -> Capabilities:
    """The current capabilities. Extras are detected, never imported; configured labels override the cluster's."""
    return Capabilities(
        labels={**cluster.labels, **config.labels},
        schedulable=cluster.schedulable,
        cpus=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_free_bytes=shutil.disk_usage(config.data_dir).free,
        python=platform.python_version(),
        extras=[name for name in _TRAINING_EXTRAS if find_spec(name) is not None],
        codecs=list(KINDS),
        samples=config.samples,
        node_config=node_config(config, cluster),
        inference_url=inference_url,
        agent_version=_own_version(),
        timezone=config.timezone or machine_timezone(),
        hardware=platform.machine(),
        protocol=OURS,
        packages=_packages(),
        sandbox=level_of(config.sandbox, config.apps_user),
        installs=config.packages.ways if find_spec("uv") is not None else [],
    )


@cache
def _packages() -> dict[str, str] | None:
    """None on a node that runs no Flower apps."""
    if find_spec("flwr") is None:
        return None
    from fedtide.fabric.packages.requirements import beside_flower  # its libraries come with flwr

    try:
        found = beside_flower()
    except Exception as exc:  # what other installers have left behind must not end the agent
        log.warning("packages.not_told", extra={"reason": f"{type(exc).__name__}: {exc}"})
        return None
    return found if len(found) <= MOST_PACKAGES else None


def machine_timezone() -> str:
    """The machine's time zone by the name that the database has, or UTC."""
    named = os.environ.get("TZ", "").removeprefix(":") or _linked_zone()
    try:
        return zone(named).key if named else "UTC"
    except ValueError:
        return "UTC"


def _linked_zone() -> str:
    try:
        return os.readlink("/etc/localtime").rpartition("zoneinfo/")[2]
    except OSError:
        return ""


def _own_version() -> str:
    try:
        return version("fedtide")
    except PackageNotFoundError:
        return "unknown"

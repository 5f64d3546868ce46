"""What a node reports: its capabilities when it joins, and its state every few seconds. Pure data."""

from __future__ import annotations

from pydantic import Field

from fedtide.fabric.messages.protocol import ProtocolRange
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.strict import ConfigValues, Message

SLOWEST_HEARTBEAT_S = 3600.0


class Capabilities(Message):
    """What a node can do; reported at every start and after every change."""

    labels: dict[str, str] = {}
    cpus: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    disk_free_bytes: int = Field(ge=0)
    python: str
    extras: list[str] = Field(default=[], description="Training runtimes present: flwr, torch, ...")
    codecs: list[str] = Field(default=[], description="Codecs that the node reads and writes (fabric.tensors.codecs)")
    samples: int | None = Field(default=None, ge=0, description="Training samples the node counts, if configured")
    node_config: ConfigValues = {}
    inference_url: str = Field(default="", description="Where programs beside the node reach it; the cloud does not")
    agent_version: str = ""
    timezone: str = Field(default="UTC", description="Of its maintenance window")
    schedulable: bool = Field(default=True, description="False while the cluster has it cordoned or drains it")
    hardware: str = Field(default="", description="Its hardware class: the machine type, if no label says more")
    protocol: ProtocolRange = ProtocolRange()
    heartbeat_s: float = Field(default=5.0, description="Seconds between its heartbeats")
    packages: dict[str, str] | None = Field(
        default=None, max_length=500, description="Python packages beside the agent's own, with version; None: not told"
    )
    sandbox: str = Field(default="", max_length=32, description="What apps are kept in (docs/sandbox.md)")
    installs: list[str] = Field(default=[], description="Where it may get packages of apps: wheels, index")


class Heartbeat(Message):
    """How a node is now. Lossy: the next one replaces it."""

    rss_bytes: int = Field(default=0, ge=0, description="Resident memory of the agent")
    trainer_rss_bytes: int = Field(default=0, ge=0)
    busy: str | None = Field(default=None, description="The task that it works on")
    stage: str = Field(default="", description="What it does for that task: downloading, training, paused: ...")
    serving: dict[str, str] = Field(default={}, description="By model: the digest of the release that it serves")
    inferences: int = Field(default=0, ge=0, description="Answered since the agent started")
    used: Usage = Field(default=Usage(), description="By the agent since it started, without training")
    wasted: Usage = Field(default=Usage(), description="For training that was cancelled, since the agent started")
    heartbeat_s: float = Field(
        default=5.0, gt=0, le=SLOWEST_HEARTBEAT_S, allow_inf_nan=False, description="Seconds until the next one"
    )
    clock: float | None = Field(default=None, allow_inf_nan=False, description="Its time, seconds since the epoch")
    boot: str = Field(default="", max_length=64, description="Which start of an agent this is")
    uptime_s: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="Since the agent started")
    bye: bool = Field(default=False, description="The agent stops")

"""The agent's configuration: a TOML or JSON file, or `FEDTIDE_*` variables over it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.ids import check_token
from fedtide.fabric.nats.subjects import HUB_REGION, RESERVED
from fedtide.fabric.nats.urls import NatsUrl
from fedtide.fabric.packages.rules import PackageRules
from fedtide.fabric.plans.windows import Window, zone
from fedtide.fabric.strict import ConfigValues, Strict
from fedtide.fabric.validation import config_error

ENV_PREFIX = "FEDTIDE_"
NODE = "FEDTIDE_KUBERNETES_NODE"
"""Environment variable: the name of the Kubernetes node, set by the DaemonSet."""
NODE_PREFIX = "FEDTIDE_NODE_PREFIX"
"""Environment variable: what goes before that name. Hosts of two regions may have the same, nodes may not."""
LONGEST_NAME = 63
_STRUCTURED = ("labels", "node_config", "providers", "session_options", "capture", "drift", "limits", "packages")
"""Fields whose environment variables hold JSON."""


class Capture(Strict):
    """Which requests become samples, and how long they stay on this node. Nothing of them leaves it."""

    share: float = Field(default=0.0, ge=0, le=1, description="Share of requests that is kept; 0: none")
    max_bytes: int = Field(default=256 * 1024 * 1024, ge=1, description="Store limit; the oldest samples are deleted")
    max_age_s: float = Field(default=30 * 86_400.0, gt=0, description="Samples older than this are deleted")


class Drift(Strict):
    """Histograms of what the models see; only sums over several nodes leave the region."""

    window_s: float = Field(default=600.0, gt=0, description="Seconds that one histogram covers")


class DriftLimits(Strict):
    """What a region's drift collector reports."""

    min_nodes: int = Field(default=5, ge=2, description="Minimum number of nodes in the sum of a region")
    min_samples: int = Field(default=500, ge=1, description="Minimum number of requests for a drift score")
    report_above: float = Field(default=0.1, ge=0, description="Minimum population stability index to report")


class TrainingLimits(Strict):
    """Limits on training's use of the machine. While one is exceeded, training is paused, not lost."""

    cpu_share: float = Field(default=1.0, gt=0, le=1, description="Share of the CPU time of all cores")
    memory_bytes: int | None = Field(default=None, ge=1, description="The trainer's private memory; enforced by OS")
    task_s: float | None = Field(default=None, gt=0, description="A task that trains longer is ended and reported")
    window: Window | None = Field(default=None, description="Training runs only inside this window")
    max_celsius: float | None = Field(default=None, description="Limit for the hottest thermal zone")
    min_battery: float | None = Field(default=None, ge=0, le=1, description="Minimum charge, 0 to 1, on battery")
    inference_slo_ms: float | None = Field(default=None, gt=0, description="Limit for the mean latency of requests")
    allow_command: list[str] = Field(default=[], description="Training runs only while this exits with code 0")
    check_s: float = Field(default=5.0, gt=0, description="Seconds between checks of the limits during training")


class AgentConfig(Strict):
    """Configuration of one agent. Every field but the first three has a default."""

    node: str = Field(description="The node's name, unique in its tenant: 1 to 63 letters, digits, `-`, `_`")
    region: str = Field(description="Its region; `hub` is reserved")
    nats_url: NatsUrl = Field(description="The leaf server of the region")
    tenant: str = Field(default="default", description="Installations that share a broker have different tenants")
    ca_file: Path | None = Field(default=None, description="CA of the broker's certificate; needed for tls://")
    credentials: Path | None = Field(
        default=None, description="This node's `.creds` file; written at enrolment. Default: identity.creds in data_dir"
    )
    join_token: str = Field(default="", description="Token for the first enrolment", repr=False)
    join_token_file: Path | None = Field(default=None, description="File that holds the join token")
    trust_root: Path | None = Field(
        default=None, description="The root that this node follows (trust-root.json); none: its join token names one"
    )
    data_dir: Path = Field(default=Path("fedtide-node"), description="Model store, outbox and run state")
    labels: dict[str, str] = Field(default={}, description="Selected by `--nodes key=value` and by roll-outs")
    node_config: ConfigValues = Field(default={}, description="Flower's node config, e.g. partition-id")
    samples: int | None = Field(default=None, ge=0, description="Training samples on this node")
    http_host: str = Field(default="127.0.0.1", description="Address of the inference server")
    http_port: int = Field(default=0, ge=0, le=65535, description="Inference server; 0: any free port")
    http_token_file: Path | None = Field(
        default=None, description="Bearer token that callers of the node's HTTP server must show"
    )
    open_inference: bool = Field(
        default=False, description="Whoever reaches the HTTP server may ask models; labels and samples need the token"
    )
    heartbeat_s: float = Field(
        default=5.0, gt=0, description="Seconds between heartbeats; a node that misses three is offline"
    )
    reconcile_s: float = Field(
        default=600.0,
        ge=1,
        description="Seconds between questions which orders there are, beside those that are pushed",
    )
    train_nice: int = Field(default=10, ge=0, le=19, description="Nice level of the trainer process")
    train_threads: int | None = Field(default=None, ge=1, description="Threads of the trainer's numeric libraries")
    train_runtime: Literal["auto", "flower", "onnx"] = Field(
        default="auto",
        description="flower: the app's code; onnx: its training bundle; auto: flower if torch is installed",
    )
    train_checkpoint_s: float = Field(
        default=20.0, ge=0, description="Seconds between checkpoints of a task that trains from a bundle"
    )
    sandbox: Literal["auto", "off"] = Field(
        default="auto", description="auto: apps are kept in the strongest sandbox that this machine offers"
    )
    apps_user: str | None = Field(
        default=None,
        max_length=64,
        coerce_numbers_to_str=True,
        description="User (name or number) that apps run as, for an agent that runs as root; none: as the agent does",
    )
    hidden: list[Path] = Field(default=[], description="Files and folders that no app sees, beside the agent's own")
    policy_file: Path | None = Field(
        default=None, description="What this node's owner allows (TOML, written by root); none: everything"
    )
    share_logs: bool = Field(default=True, description="Whether the coordinator may ask what apps print here")
    train_idle_s: float = Field(default=120.0, gt=0, description="Seconds after which an idle trainer process ends")
    inference_threads: int = Field(default=1, ge=1, description="Threads of one model run")
    inference_parallel: int = Field(default=1, ge=1, description="Concurrent model runs, over all models")
    batch_size: int = Field(default=32, ge=1, description="Most rows in one batch")
    batch_wait_ms: float = Field(default=0.0, ge=0, description="How long a request may wait for others to join it")
    queue_size: int = Field(default=256, ge=1, description="Most waiting requests of a model; more get a 429")
    providers: list[str] = Field(default=[], description="Execution providers; empty: CUDA, OpenVINO, CPU if installed")
    graph_optimization: Literal["off", "basic", "extended", "all"] = Field(
        default="all", description="ONNX Runtime's level of graph optimisation"
    )
    session_options: dict[str, str] = Field(default={}, description="ONNX Runtime's session configuration entries")
    timezone: str = Field(default="", description="Time zone of windows; empty: that of the machine")
    capture: Capture = Capture()
    drift: Drift = Drift()
    limits: TrainingLimits = TrainingLimits()
    packages: PackageRules = PackageRules()

    @field_validator("node", "region", "tenant")
    @classmethod
    def _one_token(cls, value: str) -> str:
        try:
            return check_token("name", value)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc

    @field_validator("timezone")
    @classmethod
    def _a_zone(cls, value: str) -> str:
        if value:
            zone(value)
        return value

    @field_validator("node")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value in RESERVED:
            raise ValueError(f"the node name {value!r} is taken")
        return value

    @field_validator("region")
    @classmethod
    def _not_the_hub(cls, value: str) -> str:
        if value == HUB_REGION:
            raise ValueError(f"the region name {HUB_REGION!r} is taken by the hub itself")
        return value


def load(file: Path | None, environ: Mapping[str, str] = os.environ) -> AgentConfig:
    """Read the file, then let `FEDTIDE_NODE`, `FEDTIDE_REGION`, ... replace single fields.

    Raises:
        ConfigError: names the field, what is wrong, and where to look.
    """
    values = _read(file) if file is not None else {}
    for name in AgentConfig.model_fields:
        raw = environ.get(f"{ENV_PREFIX}{name.upper()}")
        if raw is not None:
            values[name] = _json(f"{ENV_PREFIX}{name.upper()}", raw) if name in _STRUCTURED else raw
    if environ.get(NODE) and "node" not in values:
        values["node"] = node_name(environ.get(NODE_PREFIX, "") + environ[NODE])
    try:
        return AgentConfig.model_validate(values)
    except ValidationError as exc:
        wrong = config_error(exc, AgentConfig, "agent config")
        variable = f"{ENV_PREFIX}{wrong.path.split('.')[1].upper()}"
        raise ConfigError(wrong.path, wrong.problem, wrong.remedy or f"Set it in the file, or {variable}") from exc


def _json(variable: str, raw: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError as exc:
        raise ConfigError(variable, f"is not JSON: {exc}", """For example: '{"zone": "a"}'""") from exc


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(str(file), f"cannot be read: {exc.strerror}") from exc
    try:
        values: dict[str, Any] = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
        return values
    except ValueError as exc:
        raise ConfigError(str(file), f"does not parse: {exc}", "Use TOML, or JSON in a .json file") from exc


def node_name(name: str) -> str:
    """A valid node name from a Kubernetes node's name, which may have dots and be longer."""
    token = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    if len(token) <= LONGEST_NAME:
        return token
    return f"{token[:54]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

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
from fedtide.fabric.plans.windows import Window, zone
from fedtide.fabric.strict import ConfigValues, Strict
from fedtide.fabric.validation import config_error

ENV_PREFIX = "FEDTIDE_"
NODE = "FEDTIDE_KUBERNETES_NODE"
"""The cluster's name of the node, as a DaemonSet tells its pods."""
LONGEST_NAME = 63
_STRUCTURED = ("labels", "node_config", "providers", "session_options", "capture", "drift", "limits")
"""Fields that are JSON in the environment."""


class Capture(Strict):
    """Which requests become samples, and how long they stay on this node. Nothing of them leaves it."""

    share: float = Field(default=0.0, ge=0, le=1, description="Of requests; 0: none")
    max_bytes: int = Field(default=256 * 1024 * 1024, ge=1, description="Oldest samples go beyond this")
    max_age_s: float = Field(default=30 * 86_400.0, gt=0, description="Samples older than this go")


class Drift(Strict):
    """Histograms of what the models see; only sums over several nodes leave the region."""

    window_s: float = Field(default=600.0, gt=0, description="A histogram covers so much time")


class DriftLimits(Strict):
    """What a region's drift collector reports."""

    min_nodes: int = Field(default=5, ge=2, description="Fewer nodes in a region are not summed")
    min_samples: int = Field(default=500, ge=1, description="Fewer requests in a region are not judged")
    report_above: float = Field(default=0.1, ge=0, description="Population stability index that is worth an event")


class TrainingLimits(Strict):
    """When and how far training may use the machine; it is paused, not lost, while one is exceeded."""

    cpu_share: float = Field(default=1.0, gt=0, le=1, description="Of all cores")
    memory_bytes: int | None = Field(default=None, ge=1, description="The trainer's data; more is refused by the OS")
    task_s: float | None = Field(default=None, gt=0, description="A task that trains longer is ended and reported")
    window: Window | None = Field(default=None, description="Only then is trained")
    max_celsius: float | None = Field(default=None, description="Hottest thermal zone")
    min_battery: float | None = Field(default=None, ge=0, le=1, description="Charge, while it is not charging")
    inference_slo_ms: float | None = Field(default=None, gt=0, description="Mean latency of requests")
    allow_command: list[str] = Field(default=[], description="Training goes on while this ends with exit code 0")
    check_s: float = Field(default=5.0, gt=0, description="Seconds between looks, while there is something to train")


class AgentConfig(Strict):
    """What one agent needs to know. Every field but the first three has a default."""

    node: str
    region: str
    nats_url: str
    tenant: str = "default"
    ca_file: Path | None = Field(default=None, description="Whose certificates the broker may have; needed for tls://")
    credentials: Path | None = Field(
        default=None, description="This node's `.creds` file; written at enrolment. Default: identity.creds in data_dir"
    )
    join_token: str = Field(default="", description="To enrol with, once", repr=False)
    join_token_file: Path | None = Field(default=None, description="The same, in a file")
    data_dir: Path = Field(default=Path("fedtide-node"), description="Model store, outbox and run state")
    labels: dict[str, str] = {}
    node_config: ConfigValues = Field(default={}, description="Flower's node config, e.g. partition-id")
    samples: int | None = Field(default=None, ge=0, description="Training samples on this node")
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=0, ge=0, le=65535, description="Inference server; 0: any free port")
    heartbeat_s: float = Field(default=5.0, gt=0)
    train_nice: int = Field(default=10, ge=0, le=19, description="How much the trainer yields to everything else")
    train_threads: int | None = Field(default=None, ge=1, description="Threads of the trainer's numeric libraries")
    train_runtime: Literal["auto", "flower", "onnx"] = Field(
        default="auto",
        description="flower: the app's code; onnx: its training bundle; auto: flower where torch is",
    )
    train_checkpoint_s: float = Field(
        default=20.0, ge=0, description="So often a task from a training bundle saves where it is"
    )
    train_idle_s: float = Field(default=120.0, gt=0, description="An unused trainer process ends after this")
    inference_threads: int = Field(default=1, ge=1, description="Of one run of a model")
    inference_parallel: int = Field(default=1, ge=1, description="Runs at once, over all models")
    batch_size: int = Field(default=32, ge=1, description="Rows that are run together at most")
    batch_wait_ms: float = Field(default=0.0, ge=0, description="How long a request may wait for others to join it")
    queue_size: int = Field(default=256, ge=1, description="Requests of a model that wait; more are refused with 429")
    providers: list[str] = Field(default=[], description="Execution providers; empty: CUDA, OpenVINO, CPU if installed")
    graph_optimization: Literal["off", "basic", "extended", "all"] = "all"
    session_options: dict[str, str] = Field(default={}, description="ONNX Runtime's session configuration entries")
    timezone: str = Field(default="", description="Of maintenance windows; empty: that of the machine")
    capture: Capture = Capture()
    drift: Drift = Drift()
    limits: TrainingLimits = TrainingLimits()

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
        values["node"] = node_name(environ[NODE])
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
    """A Kubernetes node's name as one of ours: it may have dots and be longer than a subject's token."""
    token = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    if len(token) <= LONGEST_NAME:
        return token
    return f"{token[:54]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

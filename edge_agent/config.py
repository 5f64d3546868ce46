"""The agent's configuration: a TOML or JSON file, or `FEDTIDE_*` variables over it."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from fabric.errors import ConfigError
from fabric.ids import check_token
from fabric.subjects import HUB_REGION
from fabric.wire import ConfigValues, Strict

ENV_PREFIX = "FEDTIDE_"


class AgentConfig(Strict):
    """What one agent needs to know. Every field but the first three has a default."""

    node: str
    region: str
    nats_url: str
    tenant: str = "default"
    data_dir: Path = Field(default=Path("fedtide-node"), description="Model store, outbox and run state")
    labels: dict[str, str] = {}
    node_config: ConfigValues = Field(default={}, description="Flower's node config, e.g. partition-id")
    samples: int | None = Field(default=None, ge=0, description="Training samples on this node")
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=0, ge=0, le=65535, description="Inference server; 0: any free port")
    heartbeat_s: float = Field(default=5.0, gt=0)
    train_nice: int = Field(default=10, ge=0, le=19, description="How much the trainer yields to everything else")
    train_threads: int | None = Field(default=None, ge=1, description="Threads of the trainer's numeric libraries")
    train_idle_s: float = Field(default=120.0, gt=0, description="An unused trainer process ends after this")
    inference_threads: int = Field(default=1, ge=1)

    @field_validator("node", "region", "tenant")
    @classmethod
    def _one_token(cls, value: str) -> str:
        try:
            return check_token("name", value)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc

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
            values[name] = _json(f"{ENV_PREFIX}{name.upper()}", raw) if name in ("labels", "node_config") else raw
    try:
        return AgentConfig.model_validate(values)
    except ValidationError as exc:
        first = exc.errors()[0]
        field = ".".join(map(str, first["loc"]))
        remedy = f"Set {field!r} in the file or {ENV_PREFIX}{field.upper()} in the environment"
        raise ConfigError(f"agent config: {field}", first["msg"], remedy) from exc


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

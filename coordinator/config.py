"""The coordinator's configuration, from a file or the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fedtide.coordinator.launch.job_manifest import Kubernetes
from fedtide.fabric.messages.tasks import Strict


class CoordinatorConfig(Strict):
    """Everything one coordinator process needs."""

    name: str = Field(default="coordinator", description="Which of several coordinators; no two processes share one")
    nats_url: str
    identity_dir: Path | None = Field(
        default=None, description="What `fedtide identity init` made; without it anybody may connect to the broker"
    )
    ca_file: Path | None = Field(default=None, description="Whose certificates the broker may have; needed for tls://")
    regions: list[str] = Field(description="Regions whose leaf servers take part")
    tenant: str = "default"
    stream_replicas: Literal[1, 3] = Field(default=1, description="Servers of the hub that hold each stream")
    data_dir: Path = Field(default=Path("fedtide-coordinator"), description="Logs and work files of local aggregators")
    kubernetes: Kubernetes | None = Field(default=None, description="Aggregators are Jobs; without it local processes")
    warm_aggregator: bool = Field(default=True, description="Keep a process ready for the next run, about 150 MB")
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=0, ge=0, le=65535, description="API; 0: any free port")
    http_cert: Path | None = Field(default=None, description="Certificate of the API; with it and its key it is https")
    http_key: Path | None = None
    http_token_file: Path | None = Field(default=None, description="Bearer token that callers of the API must show")
    advertise_url: str = Field(default="", description="Where other coordinators reach this one's API")
    standby: Literal["redirect", "proxy"] = Field(
        default="redirect", description="What a standby does with callers: tells them who leads, or asks it for them"
    )
    http_server_name: str = Field(default="", description="What `http_cert` is made out to, for other coordinators")
    endpoint_file: Path | None = Field(default=None, description="Where the API's address is written once it listens")

"""The coordinator's configuration, from a file or the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from fedtide.fabric.messages.people import Role
from fedtide.fabric.nats.accounts import MOST_REGIONS
from fedtide.fabric.nats.urls import NatsUrl
from fedtide.fabric.packages.rules import PackageRules
from fedtide.fabric.process.web_access import is_loopback
from fedtide.fabric.strict import Strict


class Tier(Strict):
    """What aggregators of models up to a size get; `resources` are limits, e.g. GPUs or a MIG slice."""

    up_to_bytes: int | None = Field(default=None, ge=1, description="Of the model's arrays; none: any size")
    resources: dict[str, str] = Field(description="For example {cpu: '4', memory: 8Gi, nvidia.com/gpu: '1'}")
    node_selector: dict[str, str] = Field(default={}, description="Labels of cluster nodes for this tier")
    claims: dict[str, str] = Field(
        default={}, description="Devices by dynamic resource allocation: name, and its ResourceClaimTemplate"
    )


class Kubernetes(Strict):
    """How aggregators run in a cluster. Jobs are made in the coordinator's own namespace unless another is named."""

    namespace: str = Field(description="Where Jobs are created")
    image: str = Field(description="The aggregator's image")
    tenant: str = Field(default="", description="Whose Jobs; empty: those of the installation itself")
    release: str = Field(description="Name of the installation; its Secrets and Jobs begin with it")
    image_pull_secrets: list[str] = Field(default=[], description="Names of Secrets")
    service_account: str = Field(default="", description="Of the Jobs; empty: the namespace's default")
    tiers: list[Tier] = Field(
        default=[Tier(resources={"cpu": "2", "memory": "4Gi"})],
        min_length=1,
        description="The first tier that a model fits into is used; after running out of memory the next one",
    )
    image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = Field(
        default="", description="Of the image; empty: Kubernetes' own rule"
    )
    node_selector: dict[str, str] = Field(default={}, description="Of the Jobs' pods, beside that of their tier")
    annotations: dict[str, str] = Field(default={}, description="Of the Jobs' pods")
    security_context: dict[str, Any] = Field(default={}, description="Added to the pods' own, e.g. seLinuxOptions")
    tolerations: list[dict[str, Any]] = Field(default=[], description="Of the Jobs' pods")
    node_affinity: dict[str, Any] = Field(default={}, description="For example to prefer spot nodes")
    priority_class: str = Field(default="", description="Of the Jobs' pods")
    queue: str = Field(default="", description="Kueue's LocalQueue; Jobs wait, suspended, until it admits them")
    scheduler: str = Field(default="", description="Of the Jobs' pods, e.g. volcano; empty: the cluster's default")
    near_hub: bool = Field(default=False, description="Prefer the zone of the hub's servers")
    undisturbed: bool = Field(
        default=False, description="Ask Karpenter and the Cluster Autoscaler to leave machines of aggregators alone"
    )
    ttl_s: int = Field(default=3600, ge=60, description="Ended Jobs are kept for this many seconds")
    grace_s: int = Field(default=120, ge=10, description="From SIGTERM to SIGKILL: a checkpoint must be written")
    pending_s: float = Field(
        default=900.0, gt=0, description="A Job whose pod does not start is given up after this, and the run fails"
    )
    labels: dict[str, str] = Field(default={}, description="Added to every Job and pod")
    ca_secret: str = Field(default="", description="Secret with the hub's `ca.crt`; default: RELEASE-servers")


class TrackingRules(Strict):
    """Where runs may be reported to beside the coordinator's own views."""

    allowed: bool = Field(default=True, description="Whether runs may be reported anywhere else")
    mlflow: list[str] = Field(
        default=[],
        description="URLs of the MLflow servers that runs may name; empty: any, unless MLFLOW_TRACKING_* variables "
        "hold credentials, which go to whichever server a run names",
    )
    artifact_schemes: list[str] = Field(
        default=[], description="Schemes of artefact stores, such as s3, that this process may write to for MLflow"
    )
    event_files: Path | None = Field(default=None, description="TensorBoard's folder; default: in data_dir")


class Prometheus(Strict):
    """A server that gates of roll-outs may ask. Which there are is said here: a plan only names one."""

    url: str = Field(description="Where its API begins, e.g. http://prometheus:9090")
    token_file: Path | None = Field(default=None, description="Bearer token that it wants")
    ca_file: Path | None = Field(default=None, description="Authority of its certificate, if the system has it not")

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^\s?#@]+", value):
            raise ValueError("is no URL, such as http://prometheus:9090")
        return value.rstrip("/")


class Webhook(Strict):
    """Gets a CloudEvent (structured JSON) by POST."""

    kind: Literal["webhook"] = "webhook"
    url_file: Path = Field(description="File with the URL: often a secret")
    token_file: Path | None = Field(default=None, description="Bearer token")


class Slack(Strict):
    """An incoming webhook of Slack, or of whatever takes {"text": ...}; only Slack's markup is taken out."""

    kind: Literal["slack"] = "slack"
    url_file: Path = Field(description="File with the URL, which is a secret")


class Email(Strict):
    kind: Literal["email"] = "email"
    host: str = Field(description="The SMTP server")
    port: int = Field(default=587, ge=1, le=65535)
    tls: Literal["starttls", "tls", "none"] = Field(default="starttls", description="`none` sends in clear")
    sender: str = Field(description="From")
    to: list[str] = Field(min_length=1, description="Addresses")
    user: str = Field(default="", description="Empty: without a login")
    password_file: Path | None = None


class NatsSubject(Strict):
    """A NATS server, of any installation: gets the CloudEvent as JSON."""

    kind: Literal["nats"] = "nats"
    url: NatsUrl
    subject: str = Field(pattern=r"[^\s.*>]+(\.[^\s.*>]+)*")
    credentials: Path | None = None
    ca_file: Path | None = None

    @field_validator("url")
    @classmethod
    def _names_no_password(cls, value: str) -> str:
        if "@" in value:
            raise ValueError("holds a password: write it into `credentials`")
        return value


Channel = Annotated[Webhook | Slack | Email | NatsSubject, Field(discriminator="kind")]


class TraceRules(Strict):
    """Where traces go. Further settings are OpenTelemetry's own OTEL_EXPORTER_OTLP_* variables, such as HEADERS."""

    endpoint: str = Field(
        default="",
        description="URL that takes OTLP over HTTP, e.g. http://collector:4318/v1/traces; empty: nothing is traced",
    )

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^/\s@]+/[^\s@]*", value):
            raise ValueError("is no URL with a path, such as http://collector:4318/v1/traces")
        return value


class TenantRoles(Strict):
    """What people may do in one tenant. Roles of the installation mean nothing there."""

    roles: dict[str, Role] = Field(default={}, description="Role of a value of the claim, as in `oidc.roles`")
    default_role: Role | None = Field(default=None, description="Of everybody whom the provider knows; none: nobody")


class Oidc(Strict):
    """An OpenID provider whose people may use the API and the page."""

    issuer: str = Field(description="Its URL, exactly as it calls itself")
    client_id: str = Field(default="fedtide", description="As the provider knows this installation")
    client_secret_file: Path | None = Field(default=None, description="Of a confidential client; the CLI has none")
    audience: str = Field(default="", description="Of ID tokens; empty: the client's id")
    scopes: list[str] = Field(default=["openid", "profile", "email", "offline_access"])
    name_claim: str = Field(default="email", description="Claim that names a person")
    roles_claim: str = Field(default="groups", description="Claim whose values have roles")
    roles: dict[str, Role] = Field(default={}, description="Role of a value of that claim: {ml-ops: operator}")
    default_role: Role | None = Field(default=None, description="Of everybody whom the provider knows; none: nobody")
    tenants: dict[str, TenantRoles] = Field(default={}, description="Roles in tenants that are served beside, by name")
    page_url: str = Field(default="", description="Where browsers reach the page, if that is not what they say")
    ca_file: Path | None = Field(default=None, description="Authority of its certificate, if the system has it not")

    @field_validator("issuer")
    @classmethod
    def _is_safe(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise ValueError("must be https (http only on this machine)")
        return value


class CoordinatorConfig(Strict):
    """Everything one coordinator process needs."""

    name: str = Field(default="coordinator", description="Which of several coordinators; no two processes share one")
    nats_url: NatsUrl = Field(description="The hub")
    identity_dir: Path | None = Field(
        default=None,
        description="Authority and credentials, made by `fedtide up` or the Helm hook; without it the broker is open",
    )
    releases_signed_by: Literal["authority", "people"] = Field(
        default="authority",
        description="Who vouches for what runs have made: the release authority, or people with `fedtide model sign`",
    )
    ca_file: Path | None = Field(default=None, description="Authority of the broker's certificate; needed for tls://")
    regions: list[str] = Field(max_length=MOST_REGIONS, description="Regions whose leaf servers take part")
    tenant: str = Field(default="default", description="As for agents")
    stream_replicas: Literal[1, 3] = Field(default=1, description="Servers of the hub that hold each stream")
    data_dir: Path = Field(default=Path("fedtide-coordinator"), description="Logs and work files of local aggregators")
    kubernetes: Kubernetes | None = Field(default=None, description="Aggregators are Jobs; without it local processes")
    warm_aggregator: bool = Field(
        default=True,
        description="Fork aggregators from a process with all libraries loaded, about 250 MB",
    )
    packages: PackageRules = Field(
        default=PackageRules(), description="Where aggregators get what apps need beside their image's packages"
    )
    tracking: TrackingRules = TrackingRules()
    traces: TraceRules = TraceRules()
    notify: dict[str, Channel] = Field(
        default={}, description="Channels that rules may tell something through, by name"
    )
    prometheus: dict[str, Prometheus] = Field(
        default={}, description="Servers that query gates may ask, by name: {main: {url: 'http://prometheus:9090'}}"
    )
    http_host: str = Field(default="127.0.0.1", description="Address of the API")
    http_port: int = Field(default=0, ge=0, le=65535, description="API; 0: any free port")
    http_cert: Path | None = Field(default=None, description="Certificate of the API; with it and its key it is https")
    http_key: Path | None = Field(default=None, description="The private key of `http_cert`")
    http_token_file: Path | None = Field(
        default=None, description="Bearer token that callers must show; needed unless the API listens on loopback"
    )
    oidc: Oidc | None = Field(default=None, description="Where people log in; none: there is one local admin token")
    advertise_url: str = Field(default="", description="Where other coordinators reach this one's API")
    advertise_host: str = Field(
        default="", description="Instead: the address alone, of either family; scheme and port are the API's"
    )
    standby: Literal["redirect", "proxy"] = Field(
        default="redirect", description="How a standby treats requests: redirect them to the leader, or forward them"
    )
    http_server_name: str = Field(default="", description="The server name in `http_cert`, for other coordinators")
    endpoint_file: Path | None = Field(default=None, description="Where the API's address is written once it listens")

    @model_validator(mode="after")
    def _no_open_api(self) -> CoordinatorConfig:
        if self.http_token_file is None and not is_loopback(self.http_host):
            raise ValueError(f"http_token_file: is needed, because {self.http_host} is reached from other machines")
        if self.oidc is not None and self.http_token_file is None:
            raise ValueError("http_token_file: is needed with oidc, or everybody would be let in without a login")
        return self

"""`fedtide k8s ...`: a thin wrapper over Helm, and a check of what a cluster needs."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedtide.console.output import Format, Output, show_rows
from fedtide.fabric.errors import CapabilityMissing, ConfigError, FedtideError

k8s_app = typer.Typer(
    no_args_is_help=True, help="Installing in a Kubernetes cluster. Needs `helm`; see docs/kubernetes.md."
)


class Part(StrEnum):
    cloud = "cloud"
    edge = "edge"


_CHARTS = {Part.cloud: "deploy/cloud/fedtide", Part.edge: "deploy/k3s/fedtide-edge"}
_NAMES = {Part.cloud: "fedtide", Part.edge: "fedtide-edge"}
_SERVERS = {Part.cloud: "nats", Part.edge: "leaf"}

Which = Annotated[Part, typer.Argument(help="cloud: coordinator and hub; edge: a region")]
Namespace = Annotated[str, typer.Option("--namespace", "-n")]
Name = Annotated[str, typer.Option(help="Of the release; default: fedtide or fedtide-edge")]


class HelmFailed(FedtideError):
    """Helm said no; its own words are on the screen."""


@k8s_app.command("install")
def install(
    part: Which = Part.cloud,
    namespace: Namespace = "fedtide",
    name: Name = "",
    values: Annotated[list[Path] | None, typer.Option("--values", "-f", help="Values file; repeat")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, as Helm takes it; repeat")] = None,
    chart: Annotated[Path | None, typer.Option(help="Folder or archive of the chart; default: this checkout's")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show what would be applied")] = False,
) -> None:
    """Install, or upgrade what is installed, and wait until it is up."""
    where = chart or Path(_CHARTS[part])
    if not where.exists():
        raise ConfigError("--chart", f"there is no chart at {where}", "Run it in a checkout, or name the chart")
    arguments = ["upgrade", "--install", name or _NAMES[part], str(where), "-n", namespace, "--create-namespace"]
    arguments += [word for file in values or [] for word in ("-f", str(file))]
    arguments += [word for pair in set_ or [] for word in ("--set", pair)]
    _helm(*arguments, *(["--dry-run"] if dry_run else ["--wait", "--timeout", "10m"]))


@k8s_app.command("status")
def status(part: Which = Part.cloud, namespace: Namespace = "fedtide", name: Name = "") -> None:
    """What Helm knows of a release, and its resources."""
    _helm("status", name or _NAMES[part], "-n", namespace, "--show-resources")


@k8s_app.command("uninstall")
def uninstall(
    part: Which = Part.cloud,
    namespace: Namespace = "fedtide",
    name: Name = "",
    purge: Annotated[bool, typer.Option("--purge", help="Remove what stays, too: it cannot be brought back")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    context: Annotated[str, typer.Option(help="Of the kubeconfig; default: the current one")] = "",
) -> None:
    """Remove a release. Secrets of its identities, custom resources and volumes stay, unless they are purged."""
    release = name or _NAMES[part]
    secrets = _edge_secrets(release, namespace, context) if part is Part.edge else ()
    _helm("uninstall", release, "-n", namespace, "--wait", "--ignore-not-found", *_of(context))
    try:
        from fedtide.console.cli import release_remains
        from fedtide.fabric.cluster.connection import api_client
    except ImportError as exc:
        if purge:
            raise CapabilityMissing("the Kubernetes client is not here", "pip install 'fedtide[cluster]'") from exc
        typer.echo("stays: Secrets of identities, custom resources, volumes (docs/kubernetes.md)")
        return
    api = api_client(context or None)
    if part is Part.cloud:
        remains = release_remains.of_cloud(api, namespace, release)
    else:
        remains = release_remains.of_edge(api, namespace, release, secrets)
        typer.echo("stays: what agents keep on their machines, in agent.dataPath")
    for each in remains:
        typer.echo(f"stays: {each.kind} {each.name} ({each.what})")
    if not remains or not purge:
        return
    if not yes:
        typer.confirm(f"Remove these {len(remains)} for good?", abort=True)
    for each in remains:
        release_remains.remove(api, namespace, each)
    typer.echo(f"removed {len(remains)}")


def _edge_secrets(release: str, namespace: str, context: str) -> tuple[str, ...]:
    """The names of the Secrets that an edge release was given; none if it is not there."""
    command = [_helm_here(), "get", "values", release, "-n", namespace, "--all", "-o", "json", *_of(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = json.loads(done.stdout) if done.returncode == 0 else {}
    return tuple(values[field] for field in ("credentialsSecret", "joinTokenSecret") if values.get(field))


@k8s_app.command("bundle")
def bundle(
    namespace: Namespace = "fedtide",
    file: Annotated[Path | None, typer.Option("--output", "-o", help="Default: fedtide-NAMESPACE.tar.gz")] = None,
    context: Annotated[str, typer.Option(help="Of the kubeconfig; default: the current one")] = "",
) -> None:
    """For people who help: objects, events and logs of a namespace in one archive, without secrets."""
    try:
        from fedtide.console.cli import support_bundle
        from fedtide.fabric.cluster.connection import api_client
    except ImportError as exc:
        raise CapabilityMissing("the Kubernetes client is not here", "pip install 'fedtide[cluster]'") from exc
    target = file or Path(f"fedtide-{namespace}.tar.gz")
    names = support_bundle.save(api_client(context or None), namespace, target)
    typer.echo(f"{target}: {len(names)} files; of Secrets only the names of their keys. Look at it before you send it")


@k8s_app.command("grow")
def grow(
    size: Annotated[str, typer.Argument(help="Of each volume, e.g. 20Gi")],
    part: Annotated[Part, typer.Option(help="cloud: the hub; edge: a region's leaf")] = Part.cloud,
    namespace: Namespace = "fedtide",
    name: Name = "",
    context: Annotated[str, typer.Option(help="Of the kubeconfig; default: the current one")] = "",
) -> None:
    """Larger volumes for the hub or a leaf, whose pods go on; the next `helm upgrade` takes the size over."""
    try:
        from fedtide.console.cli import volume_growth
        from fedtide.fabric.cluster.connection import api_client
    except ImportError as exc:
        raise CapabilityMissing("the Kubernetes client is not here", "pip install 'fedtide[cluster]'") from exc
    release = name or _NAMES[part]
    for step in volume_growth.grow(api_client(context or None), namespace, f"{release}-{_SERVERS[part]}", size):
        typer.echo(step)
    value = "nats.storage.size" if part is Part.cloud else "leaf.storage.size"
    typer.echo(f"now upgrade the release {release} with {value}={size}")


@k8s_app.command("doctor")
def doctor(
    namespace: Namespace = "fedtide",
    context: Annotated[str, typer.Option(help="Of the kubeconfig; default: the current one")] = "",
    output: Output = Format.table,
) -> None:
    """Whether the cluster has what is needed, and what to do about what is missing."""
    try:
        from fedtide.console.cli.cluster_doctor import examine
        from fedtide.fabric.cluster.connection import api_client
    except ImportError as exc:
        raise CapabilityMissing("the Kubernetes client is not here", "pip install 'fedtide[cluster]'") from exc
    findings = list(examine(api_client(context or None), namespace))
    show_rows([asdict(f) for f in findings], output)
    if any(f.outcome == "missing" for f in findings):
        raise typer.Exit(1)


def _of(context: str) -> list[str]:
    return ["--kube-context", context] if context else []


def _helm_here() -> str:
    helm = shutil.which("helm")
    if helm is None:
        raise CapabilityMissing("there is no helm here", "Install Helm 3.14 or newer")
    return helm


def _helm(*arguments: str) -> None:
    code = subprocess.run([_helm_here(), *arguments], check=False).returncode
    if code:
        raise HelmFailed(f"helm {arguments[0]} ended with code {code}", "See above, and `fedtide k8s doctor`")

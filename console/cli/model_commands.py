"""`fedtide model ...` and `fedtide infer`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from fedtide.console import endpoints, verifying
from fedtide.console.cli.grammar import read_text
from fedtide.console.cli.verbs import shows
from fedtide.console.client import Client
from fedtide.console.home import Home
from fedtide.console.output import (
    Format,
    Limit,
    Output,
    Timeout,
    dump,
    say,
    show_fields,
    show_list,
    show_one,
    show_rows,
)
from fedtide.fabric.errors import ConfigError, NotFound
from fedtide.fabric.messages.views import InfluenceView, ModelView
from fedtide.fabric.trust import keys
from fedtide.fabric.trust.installation import ROOTS
from fedtide.fabric.trust.provenance import check_subject, named, opened, said_in, sealed

PlainHttp = Annotated[bool, typer.Option("--plain-http", help="The registry speaks no TLS")]
models_app = typer.Typer(no_args_is_help=True, help="Models and their releases.")


@models_app.command("ls")
def ls(limit: Limit = 1000, output: Output = Format.table) -> None:
    """All models."""
    views = list(Client.find().every(endpoints.models(), limit))
    show_list(views, [_row(view) for view in views], output)


def _row(view: ModelView) -> dict[str, object]:
    last = view.releases[-1] if view.releases else None
    return {
        "model": view.model,
        "latest": view.latest,
        "digest": last.digest[:12] if last is not None else None,
        "signed": last.signed if last is not None else None,
        "metrics": last.metrics if last is not None else {},
        "size_bytes": last.size_bytes if last is not None else None,
    }


@shows(models_app)
def show(model: str, output: Output = Format.table) -> None:
    """One model with all its releases and their lineage."""
    view = Client.find().send(endpoints.model(model))
    if output is not Format.table:
        show_one(view, output)
        return
    rows = [
        {
            "version": r.version,
            "digest": r.digest[:12],
            "app": r.lineage.app.name,
            "signed": r.signed,
            **r.lineage.model_dump(include={"run", "rounds", "participants", "updates"}),
            "metrics": r.metrics,
        }
        for r in view.releases
    ]
    show_list(view.releases, rows, output)


@models_app.command("pull")
def pull(
    model: str,
    version: Annotated[str, typer.Option("--version", help="A number, or latest")] = "latest",
    file: Annotated[Path | None, typer.Option("--file", help="Default: MODEL.onnx")] = None,
    folder: Annotated[Path | None, typer.Option(help="Instead: a copy that can be verified anywhere")] = None,
) -> None:
    """Download a release's ONNX file, or with --folder also its manifest and who vouches for it."""
    client = Client.find()
    data = client.send(endpoints.onnx(model, version))
    if folder is not None:
        view = client.send(endpoints.attestation(model, version))
        verifying.write(folder, view, data)
        say(f"{folder}: {view.model}@{view.version}, {len(data)} bytes, {'signed' if view.signed else 'NOT signed'}")
        return
    target = file or Path(f"{model}.onnx")
    target.write_bytes(data)
    say(f"{target}: {len(data)} bytes")


@models_app.command("verify")
def verify(
    model: Annotated[str, typer.Argument(help="MODEL or MODEL@VERSION, asked of the coordinator")] = "",
    folder: Annotated[
        Path | None, typer.Option(help="Instead: a copy (`model pull --folder`), without any network")
    ] = None,
    oci: Annotated[str, typer.Option(help="Instead: a copy in a registry, HOST/NAME:TAG")] = "",
    root: Annotated[Path | None, typer.Option(help="Whom you believe: trust-roots.json or trust-root.json")] = None,
    plain_http: PlainHttp = False,
    output: Output = Format.table,
) -> None:
    """Whether those who may vouch for a release have, and whether its bytes are what they vouch for."""
    if sum(map(bool, (model, folder, oci))) != 1:
        raise ConfigError("model", "give one of MODEL[@VERSION], --folder and --oci")
    believed = _root(root)
    with TemporaryDirectory() as scratch:
        where = folder or Path(scratch)
        if oci:
            from fedtide.console import oci as registries

            registries.pull(oci, where, plain_http=plain_http)
        elif model:
            name, _, version = model.partition("@")
            client = Client.find()
            view = client.send(endpoints.attestation(name, version or "latest"))
            verifying.write(where, view, client.send(endpoints.onnx(name, str(view.version))))
        found = verifying.verified(where, believed)
    built = found.attested.statement["predicate"]
    # Of a release that no run of ours has made nothing more is known.
    went_in = built.get("buildDefinition", {}).get("internalParameters", {})
    told = {
        "release": named(found.manifest),
        "verified": True,
        "signed by": sorted(found.attested.roles),
        "as of": datetime.fromtimestamp(found.as_of, UTC),
        "app": found.manifest.lineage.app.name,
        "run": found.manifest.lineage.run,
        "base": found.manifest.lineage.base.digest[:12] if found.manifest.lineage.base is not None else None,
        **{
            name: went_in[name] for name in ("rounds", "updates", "merkleRoot", "dropped", "privacy") if name in went_in
        },
    }
    if output is Format.table:
        show_fields(told, output)
    else:
        dump({**told, "as of": told["as of"].isoformat(), "statement": found.attested.statement}, output)


def _root(file: Path | None) -> str:
    """Whom the reader believes: a file, or the root of the present home."""
    home = Home.of_caller()
    there = file or home.trust / ROOTS
    try:
        text = there.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return str(json.loads(text)[0])
    except (OSError, ValueError, LookupError) as exc:
        raise ConfigError(
            "--root", f"{there} cannot be read: {exc}", "Name trust-root.json of the installation"
        ) from exc
    return text


@models_app.command("push")
def push(
    model: Annotated[str, typer.Argument(help="MODEL or MODEL@VERSION")],
    reference: Annotated[str, typer.Argument(help="HOST/NAME:TAG of an OCI registry")],
    plain_http: PlainHttp = False,
) -> None:
    """Copy a release into an OCI registry, with who vouches for it."""
    from fedtide.console import oci as registries

    name, _, version = model.partition("@")
    client = Client.find()
    view = client.send(endpoints.attestation(name, version or "latest"))
    with TemporaryDirectory() as scratch:
        verifying.write(Path(scratch), view, client.send(endpoints.onnx(name, str(view.version))))
        registries.push(reference, Path(scratch), plain_http=plain_http)
    say(f"pushed {name}@{view.version} to {reference}")


@models_app.command("sign")
def sign(
    model: str,
    version: Annotated[str, typer.Argument(help="A number, or latest")] = "latest",
    key: Annotated[list[str] | None, typer.Option(help="Key of a release authority: file (PEM), or hsm:...")] = None,
    envelope: Annotated[Path | None, typer.Option(help="What others have signed already")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the envelope for the next one to sign")] = None,
) -> None:
    """Vouch for a release: by hand, where people sign releases, or again after their keys were replaced."""
    client = Client.find()
    view = client.send(endpoints.attestation(model, version))
    before = envelope.read_text(encoding="utf-8") if envelope is not None else view.envelope
    said = said_in(opened(before).payload)
    check_subject(said, view.manifest.encode())
    signed = sealed(b"", [keys.load(name) for name in key or []], before)
    if out is not None:
        out.write_text(signed, encoding="utf-8")
        say(f"{out}: signed {len(opened(signed).signatures)} time(s)")
        return
    client.send(endpoints.attest(model, str(view.version), signed))
    say(f"{model}@{view.version} is vouched for")


@models_app.command("lineage")
def lineage(
    model: Annotated[str, typer.Argument(help="MODEL or MODEL@VERSION")] = "",
    node: Annotated[str, typer.Option(help="Instead: what this node's updates have influenced")] = "",
    output: Output = Format.table,
) -> None:
    """What a release was made from, what was made from it, and who serves it; or where a node's updates went."""
    if bool(model) == bool(node):
        raise ConfigError("model", "give either MODEL[@VERSION] or --node NODE")
    client = Client.find()
    if node:
        show_influence(client.send(endpoints.influence(node)), output)
        return
    name, _, version = model.partition("@")
    view = client.send(endpoints.lineage(name, version or "latest"))
    if output is not Format.table:
        show_one(view, output)
        return
    places = [("this", view.release), *(("from", a) for a in view.ancestors), *(("into", d) for d in view.descendants)]
    rows = [{"": place, **each.model_dump()} for place, each in places]
    show_rows(rows, output)
    say(f"served by {', '.join(view.served_by) or 'no node'}")


def show_influence(view: InfluenceView, output: Format) -> None:
    """What a node's updates have influenced, and how to go on without them."""
    if output is not Format.table:
        show_one(view, output)
        return
    for each in view.contributions:
        say(f"{each.run} counts updates of {view.node} in rounds {', '.join(map(str, each.rounds))}")
    for release in view.releases:
        say(f"{release.model}@{release.version} has them through {release.through}")
    served = [f"{each.node} ({each.model}@{each.version})" for each in view.served]
    say(f"served by {', '.join(served) or 'no node'}")
    for proposal in view.proposals:
        for command in [*proposal.roll_back, proposal.retrain]:
            say(f"proposed: {command}")
    if not view.contributions:
        say(f"no run that is known counts an update of {view.node}")


def infer(
    node: Annotated[str, typer.Argument(help="Name of a node")],
    file: Annotated[Path, typer.Argument(help="Open Inference Protocol v2 request (JSON)")],
    model: Annotated[str | None, typer.Option("--model", help="Default: the only one the node serves")] = None,
    timeout: Timeout = 30.0,
) -> None:
    """Send an inference request to a node, through the coordinator."""
    request = read_text(file)
    client = Client.find()
    name = model or _only_one(node, sorted(client.send(endpoints.node(node)).serving))
    call = endpoints.infer(node, name, request.encode(), timeout)
    say(client.send(call, timeout_s=timeout + 10).decode(errors="replace"))


def _only_one(node: str, models: list[str]) -> str:
    if len(models) != 1:
        served = ", ".join(models) or "none"
        raise NotFound(f"node {node} serves {len(models)} models ({served})", "Name one with --model, or roll one out")
    return models[0]

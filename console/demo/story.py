"""The demo's plot: up, train, release, roll out, train on, roll out under load, compare, down."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedtide.console import endpoints
from fedtide.console.app_bundles import TrainWith, pushed
from fedtide.console.client import Client
from fedtide.console.demo import picture
from fedtide.console.demo.inference_load import InferenceLoad
from fedtide.console.demo.plot import draw
from fedtide.console.demo.report import (
    Accuracy,
    DemoReport,
    InferenceRow,
    ReleaseRow,
    accuracy_of,
    problems,
    rollout_rows,
    round_rows,
)
from fedtide.console.embedded.plan import lay_out
from fedtide.console.embedded.supervisor import locked, running
from fedtide.console.home import Home
from fedtide.console.output import megabytes
from fedtide.console.price_template import TEMPLATE
from fedtide.console.publishing import key_of
from fedtide.console.verifying import judged
from fedtide.console.watching import draw_rollout, draw_run, follow, rollout_lines, run_lines
from fedtide.fabric.errors import ConfigError, FedtideError, NotFound
from fedtide.fabric.flower.apps import describe
from fedtide.fabric.messages.views import RolloutView, RunView
from fedtide.fabric.plans.prices import PriceBook
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.process.files import keep_caches_in
from fedtide.fabric.process.web_access import COOKIE
from fedtide.fabric.trust.installation import ROOTS
from fedtide.fabric.validation import checked

ROUNDS_PER_RUN = 3
REQUESTS_EACH_SIDE = 50
NODES_WITHIN_S = 120.0
FEWEST_NODES = 2


class DemoFailed(FedtideError):
    """A step of the demo did not end as it should."""


def tell(regions: list[str], nodes_per_region: int, train: TrainWith = TrainWith.flower) -> int:
    """Run the demo; 0 only if everything in the report is as it should be."""
    app = Path(__file__).resolve().parents[2] / "examples" / "digits"
    if not app.is_dir():
        raise NotFound("the example app is not beside this installation", "Run the demo from a checkout")
    if len(regions) * nodes_per_region < FEWEST_NODES:
        raise ConfigError("--nodes-per-region", f"the demo needs {FEWEST_NODES} nodes in all", "Its app waits for them")
    began = time.monotonic()
    outer = Home.find()
    home = Home(outer.root / "demo")
    keep_caches_in(outer.root)
    console = Console(width=None if sys.stdout.isatty() else 120)
    names = "report.json", "accuracy.png", "page.png"
    report_file, plot_file, page_file = (outer.root / f"demo-{name}" for name in names)
    page_file.unlink(missing_ok=True)
    with locked(home):
        _forget_last_time(home)
        report = asyncio.run(_told(home, app, regions, nodes_per_region, console, began, train))
    report_file.write_text(report.model_dump_json(indent=2))
    draw(report, plot_file)
    _summarise(console, report)
    console.print(f"report: {report_file}\nplot:   {plot_file}")
    if page_file.exists():
        console.print(f"page:   {page_file}")
    return 0 if report.ok else 1


def _forget_last_time(home: Home) -> None:
    for entry in home.root.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)


async def _told(
    home: Home, app: Path, regions: list[str], nodes_per_region: int, console: Console, began: float, train: TrainWith
) -> DemoReport:
    layout = lay_out(home, regions, nodes_per_region, agent={"train_runtime": train.value})
    console.rule(f"up: hub, {len(regions)} leaf servers, coordinator, {len(layout.nodes)} agents")
    async with running(home, layout):
        return await asyncio.to_thread(_act, home, app, console, began, train)


def _act(home: Home, app: Path, console: Console, began: float, train: TrainWith) -> DemoReport:
    state = home.state_of_this_process()
    client = Client.of(home, state.apis, by="demo")
    _until_online(client, len(state.nodes))
    client.send(endpoints.apply_prices(checked(PriceBook, yaml.safe_load(TEMPLATE))))
    model = describe(app).model or ""
    key = str(key_of(home))
    reference = pushed(client, app, {}, train, key=key)

    console.rule("run 1: from a random model")
    first = _train(client, RunRequest(app=reference, model=model))
    console.rule("roll-out 1: to every region, canary first")
    _roll_out(client, model, state.regions)
    console.rule("run 2: from release 1")
    second = _train(client, RunRequest(app=reference, model=model, base="latest"))
    console.rule("roll-out 2: while a client keeps asking a node of the last region")
    rolled, load = _roll_out_under_load(client, model, state.regions, state.nodes[-1], app)
    console.rule("the same network trained on the pooled data")
    centralised = _centralised(app, 2 * ROUNDS_PER_RUN)

    sensors = _sensors(client, app.with_name("sensors"), key, console) if train is TrainWith.onnx else None

    console.rule("what it cost, by the prices of `fedtide price template`")
    _tell_costs(client, console)
    shown = COOKIE, home.api_token_file.read_text().strip()
    picture.take(f"{state.apis[0]}/ui/", shown, home.root.parent / "demo-page.png")

    rows = round_rows([first, second])
    release = client.send(endpoints.model(model)).releases[-1]
    report = DemoReport(
        ok=True,
        seconds=round(time.monotonic() - began, 1),
        nodes=len(state.nodes),
        regions=state.regions,
        rounds=rows,
        accuracy=Accuracy(initial=accuracy_of(first.rounds[0]), federated=rows[-1].accuracy, centralised=centralised),
        release=ReleaseRow(
            digest=release.digest,
            onnx_max_abs_diff=release.metrics["onnx_max_abs_diff"] or 0.0,
            signed_by=_vouched(client, home, model),
        ),
        rollout=rollout_rows(rolled),
        inference=InferenceRow(
            requests=len(load.versions), dropped=load.dropped, swapped_at_request=load.first_of(str(release.version))
        ),
        trained_with=train.value,
        sensors_accuracy=sensors,
    )
    found = problems(report)
    return report.model_copy(update={"ok": not found, "problems": found})


def _until_online(client: Client, count: int) -> None:
    deadline = time.monotonic() + NODES_WITHIN_S
    while client.send(endpoints.status()).nodes.online < count:
        if time.monotonic() > deadline:
            raise DemoFailed(f"fewer than {count} nodes came online", "See the logs below the demo's folder")
        time.sleep(0.1)


def _sensors(client: Client, app: Path, key: str, console: Console) -> float:
    """The other example, also without torch; its accuracy on people whom no node has seen."""
    console.rule("the other example, without torch as well")
    view = _train(client, RunRequest(app=pushed(client, app, {}, TrainWith.onnx, key=key), model="sensors"))
    return accuracy_of(view.rounds[-1])


def _train(client: Client, request: RunRequest) -> RunView:
    view = client.send(endpoints.start_run(request.model_copy(update={"rounds": ROUNDS_PER_RUN})))
    last = follow(client.stream(endpoints.watch_run(view.run)), draw_run, run_lines) or view
    if last.state != "completed":
        raise DemoFailed(f"{view.run} {last.state}: {last.reason}")
    return last


def _vouched(client: Client, home: Home, model: str) -> list[str]:
    """Who vouches for the newest release, as anybody may verify it who knows the root.

    Raises:
        Untrusted: nobody who may.
    """
    view = client.send(endpoints.attestation(model, "latest"))
    root = json.loads((home.trust / ROOTS).read_text())[0]
    return sorted(judged(view.manifest.encode(), view.envelope, view.trust, root).attested.roles)


def _roll_out(client: Client, model: str, regions: list[str]) -> RolloutView:
    view = client.send(endpoints.start_rollout(RolloutRequest(model=model, regions=list(regions))))
    return follow(client.stream(endpoints.watch_rollout(view.rollout)), draw_rollout, rollout_lines) or view


def _roll_out_under_load(
    client: Client, model: str, regions: list[str], node: str, app: Path
) -> tuple[RolloutView, InferenceLoad]:
    body = _python(app, "digits.sample_request").encode()
    load = InferenceLoad(client.send(endpoints.node(node)).inference_url, model, body)
    load.start()
    try:
        if not load.wait_for("1", REQUESTS_EACH_SIDE, 60):
            raise DemoFailed(f"node {node} does not answer inference requests with release 1")
        rolled = _roll_out(client, model, regions)
        load.wait_for("2", REQUESTS_EACH_SIDE, 60)
    finally:
        load.stop()
    return rolled, load


def _tell_costs(client: Client, console: Console) -> None:
    view = client.send(endpoints.costs("model,phase"))
    table = Table("model", "phase", f"cost, {view.currency}", "of no use", "CPU", box=SIMPLE_HEAD)
    for row in view.rows:
        cpu = f"{row.quantities.get('cpu', 0) / 1e6:.1f} s"
        table.add_row(*row.group.values(), f"{row.cost:.6f}", f"{row.wasted:.6f}", cpu)
    table.add_row("all", "", f"{view.total.cost:.6f}", f"{view.total.wasted:.6f}", "")
    console.print(table)


def _centralised(app: Path, rounds: int) -> float:
    epochs = rounds * int(describe(app).config["local-epochs"])
    accuracy: float = json.loads(_python(app, "digits.centralised", str(epochs)))["accuracy"]
    return accuracy


def _python(app: Path, module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=app, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise DemoFailed(f"{module} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def _summarise(console: Console, report: DemoReport) -> None:
    table = Table("round", "accuracy", "nodes", "up", "down", "seconds", box=SIMPLE_HEAD, title="rounds")
    for r in report.rounds:
        row = (r.round, f"{r.accuracy:.3f}", r.participants, megabytes(r.bytes_up), megabytes(r.bytes_down), r.seconds)
        table.add_row(*map(str, row))
    console.print(table)
    a, i = report.accuracy, report.inference
    console.print(
        f"accuracy: {a.initial:.3f} at the start, {a.federated:.3f} federated, {a.centralised:.3f} centralised\n"
        f"release:  {report.release.digest[:12]}, ONNX within {report.release.onnx_max_abs_diff:.1e} of torch, "
        f"vouched for by {', '.join(report.release.signed_by)}\n"
        f"roll-out: " + ", ".join(f"{r.region} {r.confirmed} in {r.seconds:.1f} s" for r in report.rollout) + "\n"
        f"inference: {i.requests} requests, {i.dropped} dropped, new release from request {i.swapped_at_request} on\n"
        + (f"sensors:  {report.sensors_accuracy:.3f} without torch\n" if report.sensors_accuracy is not None else "")
        + f"all in {report.seconds:.0f} s: "
        + ("everything really happened" if report.ok else "; ".join(report.problems))
    )

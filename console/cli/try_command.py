"""`fedtide try`: one round of a tiny app that needs nothing, to see whether training works from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtide.console import endpoints
from fedtide.console.app_bundles import TrainWith, pushed
from fedtide.console.cli import grammar
from fedtide.console.client import Client
from fedtide.console.output import say
from fedtide.console.publishing import signing_key
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.messages.views import RUN_ENDED, RunView
from fedtide.fabric.plans.round_policy import RoundPolicy
from fedtide.fabric.plans.run_spec import RunRequest

LINE = Path(__file__).parents[1] / "line"
"""The app: a straight line, in numpy."""


class TryFailed(FedtideError):
    """The round did not come to its end."""


def try_(
    nodes: Annotated[str, typer.Option("--nodes", help="Labels, e.g. region=eu-west")] = "",
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds: an image may have to come first")
    ] = 600.0,
    key_optional: Annotated[
        bool, typer.Option("--key-optional", help="Where no publisher's key is, check all but training")
    ] = False,
) -> None:
    """One round of a tiny built-in app: whether nodes train from end to end. Makes a release of the model `line`."""
    client, selector = Client.find(), grammar.labels("--nodes", nodes)
    online = list(client.every(endpoints.nodes(state="online", labels=nodes)))
    able = [node for node in online if "flwr" in node.extras]
    if not able:
        say(f"the API answers; {len(online)} nodes are online, none of them with Flower: training was not tried")
        return
    if key_optional and not Path(signing_key()).is_file():
        say(f"the API answers; {len(able)} nodes could train, no publisher's key is here: training was not tried")
        return
    app = pushed(client, LINE, {}, TrainWith.flower)
    request = RunRequest(app=app, model="line", rounds=1, selector=selector, policy=RoundPolicy(deadline_s=timeout))
    run = client.send(endpoints.start_run(request)).run
    last: RunView | None = None
    for last in client.stream(endpoints.watch_run(run), timeout_s=timeout):
        if last.state in RUN_ENDED:
            break
    if last is None or last.state not in RUN_ENDED:
        client.send(endpoints.act_on_run(run, "cancel", "not done in time"))
        raise TryFailed(f"{run} is not done after {timeout:.0f} s", f"See `fedtide why {run}`")
    if last.state != "completed":
        raise TryFailed(f"{run} {last.state}: {last.reason}", f"See `fedtide run show {run}`")
    where = f"{len(last.participants)} of {len(able)} nodes in {last.seconds or 0:.1f} s"
    say(f"{run}: a round was trained on {where}; line v{last.version}")

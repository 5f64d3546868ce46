"""fedtide for notebooks: `fedtide.Client`. Runs are objects, rounds and costs are pandas frames.

    import fedtide
    client = fedtide.Client()                       # the installation that is up here, or FEDTIDE_SERVER
    run = client.start("examples/sensors", rounds=5).watch()
    run.rounds[["accuracy", "participants"]]
    run.plot("accuracy")

It is thin over the HTTP API, as the command line is. Needs the extra `notebook`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from html import escape
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtide.console import endpoints
from fedtide.console.app_bundles import TrainWith, pushed
from fedtide.console.client import Client as ApiClient
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.ids import new_id
from fedtide.fabric.messages.requests import RolloutActionName, RunActionName
from fedtide.fabric.messages.views import RUN_ENDED, PlannedRollout, RolloutView, RunView
from fedtide.fabric.plans.prices import SHOWN_IN, UNITS
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.validation import checked

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class RunDidNotComplete(FedtideError):
    """A run that was waited for ended otherwise."""


class Client:
    """An installation. Every method asks it anew: nothing is cached.

    Raises:
        NotFound: no installation is up here, and FEDTIDE_SERVER names none.
    """

    def __init__(self) -> None:
        self._api = ApiClient.find(by="notebook")

    def start(
        self, app: str | Path, *, rounds: int | None = None, config: Mapping[str, Any] | None = None, **options: Any
    ) -> Run:
        """Start a run of a Flower app.

        Args:
            config: values over those of the app's pyproject.toml.
            options: as in a trigger rule: model, base, selector, selection, policy, stop, labels, ...

        Raises:
            ConfigError: the app or an option is wrong.
        """
        from fedtide.fabric.flower.apps import describe, fuse

        described = describe(Path(app))
        overrides = dict(config or {})
        if rounds is not None and "num-server-rounds" in described.config:
            overrides.setdefault("num-server-rounds", rounds)
        fuse(described.config, overrides)
        asked = {"rounds": rounds, "run_config": overrides, "model": described.model, **options}
        request = checked(RunRequest, asked)
        ref = pushed(self._api, Path(app), overrides, TrainWith.flower)
        view = self._api.send(endpoints.start_run(request.model_copy(update={"app": ref})), key=new_id("key"))
        return Run(self._api, view.run)

    def run(self, name: str) -> Run:
        """Raises ApiError if there is no such run."""
        self._api.send(endpoints.run(name))
        return Run(self._api, name)

    def runs(self, **filters: str) -> pd.DataFrame:
        """All runs, oldest first; `filters`: state, model, app."""
        views = self._api.every(endpoints.runs(**filters))
        columns = ("run", "app", "model", "version", "state", "by", "requested_at", "seconds")
        rows = [{**{c: getattr(v, c) for c in columns}, "rounds": len(v.rounds)} for v in views]
        return _frame(rows, "run", [*columns, "rounds"])

    def nodes(self, **filters: str) -> pd.DataFrame:
        """The fleet; `filters`: state, region."""
        columns = ("name", "region", "state", "reason", "busy", "cpus", "memory_bytes", "samples", "inferences")
        rows = [{c: getattr(v, c) for c in columns} for v in self._api.every(endpoints.nodes(**filters))]
        return _frame(rows, "name", columns)

    def releases(self, model: str) -> pd.DataFrame:
        """A model's releases with their metrics and where each came from."""
        rows = [
            {"version": r.version, "run": r.lineage.run, "updates": r.lineage.updates, **r.metrics}
            for r in self._api.send(endpoints.model(model)).releases
        ]
        return _frame(rows, "version", ("version", "run", "updates"))

    def roll_out(self, model: str, **plan: Any) -> Rollout:
        """Roll a release out; `plan`: fields of a roll-out plan (docs/rollouts.md)."""
        asked = checked(RolloutRequest, {"model": model, **plan})
        return Rollout(self._api, self._api.send(endpoints.start_rollout(asked), key=new_id("key")).rollout)

    def plan(self, model: str, **plan: Any) -> PlannedRollout:
        """What a roll-out would do; it changes nothing."""
        return self._api.send(endpoints.plan_rollout(checked(RolloutRequest, {"model": model, **plan})))

    def trigger(self, type: str, **data: Any) -> dict[str, str]:
        """Send an event, as a webhook would; by rule: what it decided."""
        event = {"specversion": "1.0", "id": new_id("notebook"), "source": "notebook", "type": type, "data": data}
        return dict(self._api.send(endpoints.send_event(dumps(event).encode())).rules)

    def cost(self, by: str = "model", *, days: float | None = None, where: str = "") -> pd.DataFrame:
        """Costs by one or more dimensions (docs/costs.md); `cost` and `wasted` are Decimal, quantities have units."""
        since = datetime.now(UTC) - timedelta(days=days) if days is not None else None
        view = self._api.send(endpoints.costs(by, since, None, where))
        rows = [
            {
                **row.group,
                "cost": row.cost,
                "wasted": row.wasted,
                **{f"{m} [{SHOWN_IN[m]}]": float(q / UNITS[m][SHOWN_IN[m]]) for m, q in row.quantities.items()},
            }
            for row in view.rows
        ]
        found = _frame(rows, None, [*view.by, "cost", "wasted"])
        found.attrs = {"currency": view.currency, "total": view.total.cost}
        return found.set_index(view.by) if view.by else found


class Run:
    """One run. `view` is what the API says of it now."""

    def __init__(self, api: ApiClient, name: str) -> None:
        self._api = api
        self.name = name

    @property
    def view(self) -> RunView:
        return self._api.send(endpoints.run(self.name))

    @property
    def state(self) -> str:
        return self.view.state

    @property
    def rounds(self) -> pd.DataFrame:
        """A row a round: its metrics, participants, bytes up and down, seconds.

        A metric that has the name of one of our columns is `metric.NAME`.
        """
        own = ("round", "participants", "refused", "bytes_up", "bytes_down", "seconds")
        rows = [
            {
                "round": r.round,
                **{f"metric.{name}" if name in own else name: value for name, value in r.metrics.items()},
                "participants": len({n for name, p in r.phases.items() if _trains(name) for n in p.received}),
                "refused": sum(len(phase.refused) for phase in r.phases.values()),
                "bytes_up": r.bytes_up,
                "bytes_down": r.bytes_down,
                "seconds": r.seconds,
            }
            for r in self.view.rounds
        ]
        return _frame(rows, "round", own)

    def watch(self) -> Run:
        """Wait for the end, with a line for each round.

        Raises:
            RunDidNotComplete: it failed or was cancelled; the reason is in the error.
        """
        told: set[int] = set()
        last: RunView | None = None
        for last in self._api.stream(endpoints.watch_run(self.name)):
            for each in last.rounds:
                if each.state == "closed" and each.round not in told:
                    told.add(each.round)
                    metrics = ", ".join(f"{k} {v:.4g}" for k, v in each.metrics.items() if v is not None)
                    print(f"{self.name} round {each.round}: {metrics or 'closed'}")
        if last is None or last.state in RUN_ENDED - {"completed"}:
            reason = last.reason if last is not None else "nothing is known of it"
            raise RunDidNotComplete(f"{self.name} did not complete: {reason}", f"See `fedtide why {self.name}`")
        print(f"{self.name} {last.state}")
        return self

    def act(self, action: RunActionName) -> Run:
        """`pause`, `resume`, `stop` (complete it with what it has) or `cancel`."""
        self._api.send(endpoints.act_on_run(self.name, action))
        return self

    def logs(self, node: str = "") -> str:
        """What the ServerApp printed, or the ClientApp on a node."""
        page = self._api.send(endpoints.run_logs(self.name, node))
        return "\n".join(f"{line.at:%H:%M:%S} {line.level} {line.text}" for line in page.lines)

    def cost(self, by: str = "phase,outcome") -> pd.DataFrame:
        """As `Client.cost`, of this run."""
        client = Client.__new__(Client)
        client._api = self._api
        return client.cost(by, where=f"run={self.name}")

    def plot(self, *metrics: str) -> Axes:
        """Metrics over rounds; none named: all of them.

        Raises:
            ConfigError: the run has no such metric.
        """
        from matplotlib import pyplot

        rounds = self.rounds
        own = [c for c in rounds.columns if c not in ("participants", "refused", "bytes_up", "bytes_down", "seconds")]
        if unknown := sorted(set(metrics) - set(own)):
            raise ConfigError("metric", f"{self.name} has no {unknown[0]!r}", f"It has: {', '.join(own) or 'none'}")
        _, axes = pyplot.subplots()
        for name in metrics or own:
            axes.plot(rounds.index, rounds[name], marker="o", label=name)
        axes.set_xlabel("round")
        axes.set_title(self.name)
        axes.legend()
        return axes

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.state}>"

    def _repr_html_(self) -> str:
        view = self.view
        reason = f": {escape(view.reason)}" if view.reason else ""
        return f"<p><b>{escape(view.run)}</b> {escape(view.app)}, {view.state}{reason}</p>{self.rounds.to_html()}"


class Rollout:
    """One roll-out. `view` is what the API says of it now."""

    def __init__(self, api: ApiClient, name: str) -> None:
        self._api = api
        self.name = name

    @property
    def view(self) -> RolloutView:
        return self._api.send(endpoints.rollout(self.name))

    @property
    def regions(self) -> pd.DataFrame:
        """A row a region: its state, and how many nodes confirmed or failed."""
        columns = ("region", "state", "nodes", "confirmed", "failed", "absent", "wan_bytes", "seconds")
        return _frame([{c: getattr(w, c) for c in columns} for w in self.view.regions], "region", columns)

    def watch(self) -> Rollout:
        """Wait until it is over or paused; its state and the reason are in `view`."""
        for view in self._api.stream(endpoints.watch_rollout(self.name)):
            said = ", ".join(f"{w.region} {w.state} {w.confirmed}/{w.nodes}" for w in view.regions)
            print(f"{self.name} {view.state}: {view.reason or said}")
        return self

    def act(self, action: RolloutActionName) -> Rollout:
        """`pause`, `resume`, `promote`, `next`, `retry`, `abort` or `rollback`."""
        self._api.send(endpoints.act_on_rollout(self.name, action))
        return self

    def __repr__(self) -> str:
        return f"<Rollout {self.name}: {self.view.state}>"


def _trains(phase: str) -> bool:
    """Actions of an app are `train.<action>`."""
    return phase.partition(".")[0] == "train"


def _frame(rows: list[dict[str, Any]], index: str | None, columns: Any) -> pd.DataFrame:
    """With these columns also if there are no rows."""
    try:
        import pandas as pd
    except ModuleNotFoundError as exc:
        raise ConfigError("pandas", "is not installed here", "pip install 'fedtide[notebook]'") from exc
    found = pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns))
    return found.set_index(index) if index is not None else found

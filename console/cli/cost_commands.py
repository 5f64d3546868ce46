"""`fedtide cost ...`, `fedtide price ...`, `fedtide budget ...`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtide.console import endpoints, focus, opencost
from fedtide.console.cli import grammar
from fedtide.console.cli.rule_files import read, validate
from fedtide.console.cli.verbs import removes, shows
from fedtide.console.client import Client
from fedtide.console.output import Format, Limit, Output, dump, say, show_list, show_one, show_rows
from fedtide.console.price_template import TEMPLATE
from fedtide.fabric.errors import ConfigError, NotFound
from fedtide.fabric.messages.cost_views import CostRow, CostView
from fedtide.fabric.plans.prices import SHOWN_IN, UNITS, Budget, Meter, PriceBook

costs_app = typer.Typer(no_args_is_help=False, help="What was used, what it cost, and whether it was worth it.")
prices_app = typer.Typer(no_args_is_help=True, help="The price book.")
budgets_app = typer.Typer(no_args_is_help=True, help="How much something may cost.")


class Shown(StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"
    csv = "csv"


By = Annotated[str, typer.Option("--by", help="Dimensions, e.g. model,region or label.customer; empty: the total")]
Since = Annotated[str, typer.Option("--since", help="7d, 12h, or a time: 2026-11-01, 2026-11-01T12:00")]
Until = Annotated[str, typer.Option("--until", help="As --since; empty: now")]
Where = Annotated[str, typer.Option("--where", help="Only these, e.g. model=m,region=eu")]


@costs_app.callback(invoke_without_command=True)
def costs(
    context: typer.Context,
    by: By = "model",
    since: Since = "",
    until: Until = "",
    where: Where = "",
    output: Annotated[Shown, typer.Option("-o", "--output", help="table, json, yaml or csv")] = Shown.table,
) -> None:
    """Costs by model, or by any other dimension; what is wasted, and what one update, round and roll-out costs."""
    if context.invoked_subcommand is not None:
        return
    view = _costs(by, since, until, where)
    rows = [_line(view, row) for row in view.rows]
    if output is Shown.csv:
        _csv(sys.stdout, [_exact(row) for row in [*view.rows]])
    elif output is not Shown.table:
        dump(view.model_dump(mode="json"), Format(output.value))
    else:
        show_rows(_told([*rows, _line(view, view.total, "total")]), Format.table)
        _hints(view)


def _costs(by: str, since: str, until: str, where: str) -> CostView:
    begin, end = _moment("--since", since), _moment("--until", until)
    return Client.find().send(endpoints.costs(by, begin, end, where))


def _line(view: CostView, row: CostRow, name: str = "") -> dict[str, Any]:
    group = {key: row.group.get(key, name) for key in view.by} or {"": name or "all"}
    units = {meter: amount(meter, quantity) for meter, quantity in row.quantities.items()}
    counted: tuple[Meter, ...] = ("cpu", "gpu", "wan_down", "wan_up", "stored", "updates", "rounds", "inferences")
    return {
        **group,
        f"cost {view.currency}": money(row.cost),
        "wasted": money(row.wasted),
        "saved by discounts": money(row.list_cost - row.cost),
        "saved by caches": money(row.wan_saved),
        "an update": money(row.per["update"]) if "update" in row.per else "-",
        **{meter: units.get(meter, "-") for meter in counted},
    }


def _exact(row: CostRow) -> dict[str, Any]:
    """For programs: nothing is rounded, so the rows add up."""
    money_ = {"cost": row.cost, "list_cost": row.list_cost, "wasted": row.wasted, "wan_saved": row.wan_saved}
    return {**row.group, **money_, **{meter: row.quantities.get(meter, 0) for meter in UNITS}}


def _told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without columns that say nothing in any row."""
    empty = {column for column in (rows[0] if rows else ()) if all(row[column] in ("-", "0.00") for row in rows)}
    return [{column: value for column, value in row.items() if column not in empty} for row in rows]


def money(value: Decimal) -> str:
    """Two decimals, and more where that says nothing."""
    return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.4g}"


def amount(meter: Meter, quantity: int) -> str:
    """A quantity in its unit for people."""
    unit = SHOWN_IN[meter]
    return str(quantity) if unit == "1" else f"{Decimal(quantity) / UNITS[meter][unit]:.4g} {unit}"


def _hints(view: CostView) -> None:
    if view.unpriced:
        say(f"No price for {', '.join(view.unpriced)}: these cost nothing here. See `fedtide price template`.")


@costs_app.command("explain")
def explain(run: str, output: Output = Format.table) -> None:
    """What one run has cost: by phase, region and outcome, and by round."""
    view = _costs("phase,region,outcome", "", "", f"run={run}")
    if not view.rows:
        raise NotFound(f"nothing is booked for a run {run!r}", "See `fedtide run ls`")
    rounds = _costs("round", "", "", f"run={run}")
    if output is not Format.table:
        both = {"by_outcome": view, "by_round": rounds}
        dump({"run": run, **{name: each.model_dump(mode="json") for name, each in both.items()}}, output)
        return
    total = view.total
    say(f"{run}: {money(total.cost)} {view.currency}, of which {money(total.wasted)} was of no use")
    for name, each in total.per.items():
        say(f"  one {name}: {money(each)}")
    show_rows(_told([_line(view, row) for row in view.rows]), Format.table)
    show_rows(_told([_line(rounds, row) for row in sorted(rounds.rows, key=_round_number)]), Format.table)
    _hints(view)


def _round_number(row: CostRow) -> tuple[int, str]:
    name = row.group["round"]
    return (int(name), "") if name.isdigit() else (1 << 30, name)


@costs_app.command("compare")
def compare(
    runs: Annotated[list[str], typer.Argument(help="Runs")],
    metric: Annotated[str, typer.Option("--metric", help="What was bought, as `run show` names it")] = "accuracy",
    output: Output = Format.table,
) -> None:
    """What each run has cost, and how much of a metric that bought."""
    client, rows = Client.find(), []
    for name in runs:
        view, cost = client.send(endpoints.run(name)), _costs("", "", "", f"run={name}")
        found = [r.metrics[metric] for r in view.rounds if r.metrics.get(metric) is not None]
        if not found:
            known = sorted({key for r in view.rounds for key in r.metrics}) or ["none"]
            raise NotFound(f"{name} has no metric {metric!r}", f"It has: {', '.join(known)}")
        first, last = float(found[0] or 0), float(found[-1] or 0)
        gain, spent = last - first, float(cost.total.cost)
        rows.append(
            {
                "run": name,
                "model": view.model or "-",
                f"cost {cost.currency}": money(cost.total.cost),
                "wasted": money(cost.total.wasted),
                f"{metric} first": first,
                f"{metric} last": last,
                "gain": gain,
                f"gain per {cost.currency}": gain / spent if spent else None,
            }
        )
    show_rows(rows, output)


@costs_app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="FILE.csv or FILE.parquet")],
    since: Since = "",
    until: Until = "",
    where: Where = "",
    account: Annotated[str, typer.Option("--account", help="Who is billed, in the file")] = "fedtide",
) -> None:
    """The ledger in FOCUS 1.0 columns, for tools that read cloud bills."""
    client = Client.find()
    lines = client.every(endpoints.cost_lines(5000, _moment("--since", since), _moment("--until", until), where))
    rows = list(focus.rows(lines, client.send(endpoints.prices()).currency, account))
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as target:
            _csv(target, rows)
    elif file.suffix == ".parquet":
        _parquet(file, rows)
    else:
        raise ConfigError(str(file), "is neither .csv nor .parquet")
    say(f"{len(rows)} lines in {file}")


@costs_app.command("reconcile")
def reconcile(
    file: Annotated[Path, typer.Argument(help=f"What OpenCost answers to {opencost.ASK}")],
    output: Output = Format.table,
) -> None:
    """The ledger beside an OpenCost allocation of the cluster in the cloud: what aggregators used, and reserved."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(str(file), f"cannot be read: {exc}") from exc
    allocation = opencost.read(text, str(file))
    where = "pool=aggregators,region=cloud"
    view = Client.find().send(endpoints.costs("run", allocation.since, allocation.until, where))
    found = opencost.compared(view.rows, allocation)
    if output is not Format.table:
        dump([each.model_dump(mode="json") for each in found], output)
        return
    show_rows(
        [
            {
                "run": each.run,
                f"ledger {view.currency}": money(each.ledger),
                "OpenCost": money(each.opencost),
                "difference": money(each.difference),
                **{f"{meter} h": f"{ours:.4g} of {theirs:.4g}" for meter, (ours, theirs) in each.hours.items()},
                "used": "-" if each.share_used is None else f"{each.share_used:.0%}",
            }
            for each in found
        ],
        output,
    )
    _hints(view)


def _parquet(file: Path, rows: list[dict[str, str | None]]) -> None:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as exc:
        raise ConfigError(str(file), "needs pyarrow", "pip install 'fedtide[costs]'") from exc
    schema = arrow.schema([(column, arrow.string()) for column in (rows[0] if rows else ())])
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), file)


def _csv(target: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    writer = csv.DictWriter(target, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)


def _moment(option: str, text: str) -> datetime | None:
    if not text:
        return None
    if text[-1:] in "smhd" and text[:-1].replace(".", "").isdigit():
        return datetime.now(UTC) - timedelta(seconds=grammar.seconds(option, text))
    try:
        found = datetime.fromisoformat(text)
    except ValueError as exc:
        raise ConfigError(option, f"{text!r} is no time", "Write 7d, 12h, 2026-11-01 or 2026-11-01T12:00") from exc
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


@shows(prices_app)
def show_prices(output: Output = Format.table) -> None:
    """The price book as it holds now."""
    book = Client.find().send(endpoints.prices())
    if output is not Format.table:
        show_one(book, output)
        return
    say(f"Prices in {book.currency}")
    show_list(book.prices, [price.model_dump() for price in book.prices], output)


@prices_app.command("apply")
def apply_prices(file: Annotated[Path, typer.Argument(help="YAML, see `fedtide price template`")]) -> None:
    """Use this price book; what was used before is valued by it as well, from each price's `since` on."""
    (document, node), *more = read(file)
    if more:
        raise ConfigError(str(file), "holds more than one price book")
    book = Client.find().send(endpoints.apply_prices(validate(file, document, node, PriceBook)))
    say(f"{len(book.prices)} prices in {book.currency} hold")


@prices_app.command("template")
def template() -> None:
    """A price book to begin with."""
    say(TEMPLATE)


@budgets_app.command("apply")
def apply_budgets(file: Annotated[Path, typer.Argument(help="YAML with one budget a document")]) -> None:
    """Create or change budgets. All are checked before the first is applied."""
    client = Client.find()
    for budget in [validate(file, document, node, Budget) for document, node in read(file)]:
        client.send(endpoints.apply_budget(budget))
        say(f"{budget.name} applied: {budget.amount} a {budget.period}, then {budget.when_spent}")


@budgets_app.command("ls")
def ls(limit: Limit = 1000, output: Output = Format.table) -> None:
    """All budgets, and how they stand."""
    found = list(Client.find().every(endpoints.budgets(), limit))
    rows = [
        {
            "budget": view.budget.name,
            "scope": view.budget.scope or "everything",
            "period": view.budget.period,
            "amount": money(view.budget.amount),
            "spent": money(view.spent),
            "reserved": money(view.reserved),
            "forecast": money(view.forecast) if view.forecast is not None else "-",
            "told": ", ".join(view.told) or "-",
            "now": view.holds or "-",
        }
        for view in found
    ]
    show_list(found, rows, output)


@shows(budgets_app)
def show_budget(name: str, output: Output = Format.table) -> None:
    """One budget."""
    show_one(Client.find().send(endpoints.budget(name)), output)


@removes(budgets_app, also="remove")
def remove(name: str) -> None:
    """Remove a budget. What it holds goes on."""
    Client.find().send(endpoints.remove_budget(name))
    say(f"{name} removed")

"""Who used what and what it costs: every sum of any history is the same, and budgets hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from immutables import Map
from pydantic import ValidationError

from fedtide.coordinator import bookkeeping
from fedtide.coordinator.ledger import anomalies, budgets, views
from fedtide.coordinator.ledger.accounts import Line
from fedtide.coordinator.ledger.valuation import DIMENSIONS, TAGS, Cost, Valued, Valuer, totals, valued
from fedtide.coordinator.log import snapshot_codec
from fedtide.coordinator.log.snapshot_codec import Snapshot
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.state import World
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.costs import BudgetApplied, BudgetRemoved, PricesApplied, UsageReported, UsedFor
from fedtide.fabric.events.envelope import TriggerApplied
from fedtide.fabric.events.rollouts import RolloutAbortRequested, RolloutResumeRequested
from fedtide.fabric.events.runs import (
    AggregatorExited,
    AggregatorStarted,
    RoundClosed,
    RunCancelRequested,
    RunCleanedUp,
    RunCompleted,
    RunFailed,
    RunPauseRequested,
    RunResumeRequested,
)
from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.prices import Budget, Price, PriceBook
from fedtide.fabric.plans.trigger_rule import StartRun, TriggerRule
from tests.scenarios.build import (
    APP,
    START,
    Story,
    abandoned,
    closed,
    joined,
    opened,
    phase,
    published,
    received,
    refused,
    requested,
    rollout,
    wave,
)

BOOK = PriceBook(
    prices=[
        Price(meter="cpu", price=Decimal("0.04"), per="hour"),
        Price(meter="cpu", price=Decimal("0.07"), list_price=Decimal("0.11"), per="hour", region="eu"),
        Price(meter="memory", price=Decimal("0.005"), per="GB-hour"),
        Price(meter="wan_down", price=Decimal("0.09"), per="GB"),
        Price(meter="wan_up", price=Decimal("0.013"), per="GiB"),
        Price(meter="inferences", price=Decimal("0.33"), per="million"),
        Price(meter="stored", price=Decimal("0.1"), per="GB-month"),
    ]
)
HOUR = Usage(cpu_us=3_600_000_000)


def spent(world: World, *by: str, **where: str) -> dict[tuple[str, ...], Decimal]:
    found = totals(valued(world.ledger, world.valuer, where=where), world.valuer, by)
    return {key: total.cost for key, total in found.items()}


def quantity(world: World, meter: str, **where: str) -> int:
    return sum(v.quantity for v in valued(world.ledger, world.valuer, where=where) if v.line.meter == meter)


def a_run(*, run: str = "run-1", cpus: int = 10_000, **spec: Any) -> Story:
    """A run of two nodes, a day after they were asked: they have had time to use something."""
    story = Story()
    story.tell(PricesApplied(book=BOOK))
    for node, region in (("a", "eu"), ("b", "us")):
        known = joined(node, region)
        more = {"cpus": cpus, "memory_bytes": 10**12}
        story.tell(known.model_copy(update={"capabilities": known.capabilities.model_copy(update=more)}))
    story.tell(requested(run, **spec), AggregatorStarted(run=run, attempt=1))
    story.tell(opened(1, "a", "b", bytes_down=3000, wan_bytes=2000))
    story.tell(UsageReported(source="nobody", items=[]), after_s=86_400)
    return story


EVENTS: list[Callable[[int], Any]] = [
    lambda n: opened(n % 3 + 1, "a", "b", bytes_down=10 * n, wan_bytes=7 * n),
    lambda n: received(n % 3 + 1, "ab"[n % 2], usage=Usage(cpu_us=n, memory_kb_s=3 * n), bytes_up=n),
    lambda n: refused(n % 3 + 1, "ab"[n % 2], "too_far", usage=Usage(cpu_us=n)),
    lambda n: refused(n % 3 + 1, "ab"[n % 2], "too_far"),
    lambda n: abandoned(n % 3 + 1),
    lambda n: closed(n % 3 + 1).model_copy(update={"usage": Usage(cpu_us=n)}),
    lambda n: AggregatorExited(run="run-1", attempt=1, code=n % 2, usage=Usage(cpu_us=10 * n)),
    lambda n: AggregatorStarted(run="run-1", attempt=n % 3 + 1),
    lambda n: RunCancelRequested(run="run-1") if n % 2 else RunResumeRequested(run="run-1"),
    lambda n: UsageReported(
        source="c",
        items=[
            UsedFor(region="us", phase="serve", usage=Usage(cpu_us=n), inferences=n),
            UsedFor(phase="store", stored_kb_s=1000 * n),
        ],
    ),
]
HISTORIES = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 10**12)), max_size=25)


@settings(deadline=None)
@given(HISTORIES, st.floats(0.1, 20_000))
def test_every_group_by_of_any_history_adds_up_to_the_same_and_a_replay_gives_the_same(
    history: list[tuple[Callable[[int], Any], int]], pace_s: float
) -> None:
    story = a_run(labels={"customer": "acme"})
    for event, n in history:
        with suppress(InvalidTransition):
            story.tell(event(n), after_s=pace_s)
    ((_, whole),) = spent(story.world).items()
    dimensions = [*DIMENSIONS, *TAGS, "label.customer", "label.none"]
    for by in [(d,) for d in dimensions] + list(combinations(("model", "region", "outcome", "meter", "day"), 3)):
        assert sum(spent(story.world, *by).values()) == whole
    view = views.costs(valued(story.world.ledger, story.world.valuer), story.world.valuer, ["meter"], None, None)
    assert view.total.cost == whole == sum(row.cost for row in view.rows)
    assert all(q >= 0 for row in view.rows for q in row.quantities.values())
    read_back = snapshot_codec.decode(snapshot_codec.encode(Snapshot(0, 0, story.world, []))).world
    for other in (story.replayed(), read_back):
        assert (other.ledger, other.budgets, other.prices) == (
            story.world.ledger,
            story.world.budgets,
            story.world.prices,
        )


def test_what_nodes_and_aggregators_used_is_booked_where_it_was_and_priced_by_the_narrowest_price() -> None:
    story = a_run()
    story.tell(received(1, "a", usage=HOUR, bytes_up=100), received(1, "b", usage=HOUR, bytes_up=200, stays=True))
    story.tell(closed(1).model_copy(update={"usage": HOUR}))
    assert spent(story.world, "region", meter="cpu") == {
        ("eu",): Decimal("0.07"),
        ("us",): Decimal("0.04"),
        ("cloud",): Decimal("0.04"),
    }
    total = totals(valued(story.world.ledger, story.world.valuer, where={"meter": "cpu"}), story.world.valuer, ())[()]
    assert (total.cost, total.listed) == (Decimal("0.15"), Decimal("0.19"))
    assert quantity(story.world, "wan_up") == 100, "what stays in its region crosses no link"
    assert quantity(story.world, "wan_down") == 2000
    assert quantity(story.world, "wan_avoided") == 1000
    assert (quantity(story.world, "updates"), quantity(story.world, "rounds")) == (2, 1)


def test_wasted_work_has_its_reason_and_becomes_useful_if_it_counts_after_all() -> None:
    story = a_run()
    story.tell(received(1, "a", usage=HOUR), refused(1, "b", "not_finite", usage=HOUR), abandoned(1))
    assert spent(story.world, "outcome", meter="cpu", phase="train") == {
        ("abandoned",): Decimal("0.07"),
        ("not_finite",): Decimal("0.04"),
    }
    # The answer that was kept is reported again in the next trial, without what it took.
    story.tell(opened(1, "a", "b", trial=2, bytes_down=0), received(1, "a", trial=2))
    assert spent(story.world, "outcome", meter="cpu")[("useful",)] == Decimal("0.07")
    story.tell(refused(1, "a", "too_far", trial=2))
    assert ("useful",) not in spent(story.world, "outcome", meter="cpu"), "a strategy took it back"


def test_an_answer_that_a_second_aggregator_reports_again_is_booked_once() -> None:
    story = a_run()
    told = received(1, "a", usage=HOUR, bytes_up=100)
    story.tell(told, AggregatorStarted(run="run-1", attempt=2), told.model_copy(update={"attempt": 2}))
    assert (quantity(story.world, "cpu"), quantity(story.world, "updates")) == (3_600_000_000, 1)


def test_of_an_aggregator_that_died_is_booked_what_it_had_not_reported() -> None:
    story = a_run()
    story.tell(closed(1).model_copy(update={"usage": HOUR}))
    story.tell(AggregatorExited(run="run-1", attempt=1, code=-9, usage=HOUR + HOUR))
    assert spent(story.world, "outcome", meter="cpu") == {
        ("crashed",): Decimal("0.04"),
        ("useful",): Decimal("0.04"),
    }


def test_what_a_run_used_that_came_to_nothing_was_of_no_use_until_it_is_resumed() -> None:
    story = a_run()
    story.tell(received(1, "a", usage=HOUR), RunCancelRequested(run="run-1", reason="no"))
    assert set(spent(story.world, "outcome", meter="cpu")) == {("cancelled",)}
    story.tell(RunCleanedUp(run="run-1"), RunResumeRequested(run="run-1"))
    assert set(spent(story.world, "outcome", meter="cpu")) == {("useful",)}


def test_a_node_cannot_have_used_more_than_it_has() -> None:
    """One that lies could make any model look ruinous, and exhaust its budget."""
    story = a_run(cpus=2)
    story.tell(received(1, "a", usage=Usage(cpu_us=2**53, memory_kb_s=2**53, gpu_us=2**53)))
    assert quantity(story.world, "cpu") <= 2 * 86_500 * 10**6
    assert quantity(story.world, "memory") <= 86_500 * 10**9
    story.tell(received(1, "stranger", usage=HOUR))
    assert quantity(story.world, "cpu", region="cloud") == 0


def test_a_release_and_labels_name_what_its_run_has_cost() -> None:
    story = a_run(model="m", labels={"customer": "acme"})
    story.tell(received(1, "a", usage=HOUR), closed(1), RunCompleted(run="run-1", attempt=1), published())
    assert spent(story.world, "release", "label.customer", meter="cpu") == {("m v1", "acme"): Decimal("0.07")}


def test_prices_that_came_later_hold_for_what_was_used_before_from_their_date_on() -> None:
    story = a_run()
    story.tell(received(1, "a", usage=HOUR))
    day = START.date()
    dated = [
        Price(meter="cpu", price=Decimal(1), per="hour", until=day + timedelta(days=1)),
        Price(meter="cpu", price=Decimal(5), per="hour", since=day + timedelta(days=1)),
    ]
    story.tell(PricesApplied(book=PriceBook(currency="USD", prices=dated)))
    assert spent(story.world, "meter")[("cpu",)] == Decimal(5)


@pytest.mark.parametrize(
    ("prices", "why"),
    [
        ([{"meter": "cpu", "price": 1, "per": "GB"}], "priced per second, hour, month"),
        ([{"meter": "cpu", "price": -1, "per": "hour"}], "greater than or equal"),
        ([{"meter": "wan_avoided", "price": 1, "per": "GB"}], "is what was saved"),
        ([{"meter": "cpu", "price": 1, "per": "hour"}] * 2, "hold at the same time"),
        (
            [{"meter": "cpu", "price": 1, "per": "hour", "since": "2026-02-01", "until": "2026-01-01"}],
            "ends before it begins",
        ),
        ([{"meter": "cpu", "price": float("nan"), "per": "hour"}], "finite"),
    ],
)
def test_a_price_book_that_says_two_things_or_nonsense_is_refused(prices: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        PriceBook.model_validate({"prices": prices})


def budget(amount: str, **more: Any) -> BudgetApplied:
    return BudgetApplied(budget=Budget(name="b", amount=Decimal(amount), period="total", **more))


def test_a_threshold_is_told_once_and_rules_act_upon_it() -> None:
    story = a_run()
    rule = {"name": "r", "on": "dev.fedtide.budget.reached", "where": "share >= 0.8", "do": StartRun(app=APP)}
    story.tell(_applied(rule), budget("0.08", tell_at=[0.5, 0.8]))
    story.tell(received(1, "a", usage=HOUR))
    kept = story.world.budgets["b"]
    assert kept.spent >= Decimal("0.07")
    assert kept.told == ("actual 0.5", "actual 0.8")
    assert story.world.triggers["r"].fired == 1
    story.tell(received(1, "b", usage=Usage(cpu_us=1)), PricesApplied(book=BOOK))
    assert story.world.budgets["b"].told == ("actual 0.5", "actual 0.8")


def holds(world: World, run: str, number: int) -> str | None:
    return bookkeeping.held(world, run, number, START, {})


def _applied(rule: dict[str, Any]) -> TriggerApplied:
    return TriggerApplied(rule=TriggerRule.model_validate(rule))


def test_a_budget_is_what_the_ledger_says_whichever_way_it_was_added_up() -> None:
    story = a_run(model="m")
    story.tell(budget("100", scope={"model": "m"}))
    for number in (1, 2, 3):
        story.tell(opened(number, "a"), received(number, "a", usage=HOUR), refused(number, "a", "too_far"))
        story.tell(closed(number).model_copy(update={"usage": Usage(cpu_us=12345)}))
    kept = story.world.budgets["b"]
    assert kept.spent == sum(spent(story.world, model="m").values())
    again = budgets.begun(kept.budget, START, valued(story.world.ledger, story.world.valuer))
    assert (again.spent, again.runs) == (kept.spent, kept.runs)


def test_a_storm_of_runs_spends_no_more_than_the_budget_and_one_round_each() -> None:
    """Each asks before its round: what is open is reserved, and the first round of a new kind runs alone."""
    story = a_run()
    story.tell(budget("1", when_spent="hold"))
    world, runs = story.world, [f"run-{n}" for n in range(1, 30)]
    for key in runs[1:]:
        story.tell(requested(key), AggregatorStarted(run=key, attempt=1))
    rounds = dict.fromkeys(runs, 1)
    story.tell(received(1, "a", usage=HOUR))
    story.tell(closed(1))
    open_rounds: list[str] = []
    for _ in range(60):
        for key in runs:
            if key not in open_rounds and holds(world, key, rounds[key] + 1) is None:
                rounds[key] += 1
                open_rounds.append(key)
                story.tell(opened(rounds[key], "a", run=key))
        if not open_rounds:
            break
        key = open_rounds.pop(0)
        story.tell(received(rounds[key], "a", usage=HOUR).model_copy(update={"run": key}))
        story.tell(closed(rounds[key]).model_copy(update={"run": key}))
    kept = world.budgets["b"]
    assert Decimal("0.9") < kept.spent <= Decimal("1.01"), "spent, and by one round's error at most"
    assert all(holds(world, key, rounds[key] + 1) for key in runs)
    story.tell(budget("10", when_spent="hold"))
    assert holds(world, "run-1", 99) is None


def test_a_run_without_a_history_takes_all_that_is_left_and_others_wait() -> None:
    story = Story()
    story.tell(PricesApplied(book=BOOK), budget("1", when_spent="hold"), requested("run-1"), requested("run-2"))
    assert holds(story.world, "run-1", 1) is None
    granted = {"b": {"run-1": bookkeeping.grants(story.world, "run-1", START)["b"]}}
    assert "set aside" in (bookkeeping.held(story.world, "run-2", 1, START, granted) or "")
    assert bookkeeping.held(story.world, "run-2", 1, START, {"other": {"run-1": Decimal(5)}}) is None


def test_a_throttled_round_asks_fewer_nodes_and_other_runs_are_let_alone() -> None:
    story = a_run(model="m")
    story.tell(budget("0.05", when_spent="throttle", throttle_to=0.25, scope={"model": "m"}), requested("run-2"))
    story.tell(received(1, "a", usage=HOUR), closed(1))
    assert bookkeeping.share_of_nodes(story.world, "run-1", START) == 0.25
    assert bookkeeping.share_of_nodes(story.world, "run-2", START) == 1.0
    assert holds(story.world, "run-1", 2) is None
    story.tell(BudgetRemoved(name="b"))
    assert bookkeeping.share_of_nodes(story.world, "run-1", START) == 1.0


def test_a_spent_budget_stops_waves_but_never_a_roll_back() -> None:
    story = a_run(model="m")
    story.tell(budget("0.05", when_spent="hold"))
    story.tell(RunCompleted(run="run-1", attempt=1), published())
    story.tell(rollout(wave("eu", "a"), wave("us", "", "b")))
    story.tell(UsageReported(source="c", items=[UsedFor(phase="serve", usage=HOUR + HOUR)]))
    state = story.world.rollouts["ro-1"]
    assert isinstance(state, rollouts.Paused)
    assert "budget b is spent" in state.reason
    story.tell(rollout(wave("eu", "a"), key="ro-2", counter=3))
    assert _state(story) == "paused", "nor does a new one begin"
    story.tell(RolloutResumeRequested(rollout="ro-2"))
    assert _state(story) == "rolling", "a person may let it go on"
    story.tell(RolloutAbortRequested(rollout="ro-2"))
    assert _state(story) == "rolledback"


def _state(story: Story) -> str:
    return type(story.world.rollouts["ro-2"]).__name__.lower()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"scope": {"planet": "mars"}}, "no 'planet'"),
        ({"scope": {"region": "eu"}, "when_spent": "hold"}, "held as a whole"),
        ({"amount": 0}, "greater than 0"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Budget.model_validate({"name": "b", "amount": 1, **fields})


def test_a_new_period_begins_with_nothing_spent_and_what_is_forecast_is_told() -> None:
    kept = budgets.Kept(Budget(name="b", amount=Decimal(100), period="day"), datetime(2026, 1, 1, tzinfo=UTC))
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    kept = budgets.spend(kept, [_line("m", 12, "60")])
    assert budgets.forecast(kept, noon) == Decimal(120)
    assert [(kind, share) for kind, share, _ in budgets.reached(kept, noon)] == [("actual", 0.5), ("forecast", 1.0)]
    assert budgets.forecast(kept, datetime(2026, 1, 1, 1, tzinfo=UTC)) is None, "too early to say"
    assert budgets.in_period(kept, datetime(2026, 1, 2, tzinfo=UTC)).spent == 0


def _line(model: str, hour: int, cost: str) -> Valued:
    line = Line(hour, 0, "eu", "", "serve", "useful", "cpu")
    return Valued("", {"model": model}, line, 1, Cost(Decimal(cost), Decimal(cost)))


@pytest.mark.parametrize(
    ("amounts", "stands_out"),
    [
        ([10] * 14 + [40], True),
        ([10, 12, 9, 11, 10, 13, 10, 9, 12, 10, 40], True),
        ([10, 50, 9, 11, 10, 13, 10, 48, 12, 10, 40], True),
        ([10, 30, 9, 28, 11, 33, 10, 29, 12, 31, 40], False),
        ([10] * 14 + [14], False),
        ([10] * 5 + [400], False),
    ],
    ids=["flat", "noisy", "noisy with bad days", "it varies as much", "little more", "too short a history"],
)
def test_an_hour_that_costs_much_more_than_such_hours_stands_out(amounts: list[int], stands_out: bool) -> None:
    hours: anomalies.Hours = Map()
    for day, amount in enumerate(amounts):
        hours = anomalies.added(hours, 24 * day, Decimal(amount))
    last = 24 * (len(amounts) - 1)
    assert (anomalies.found("model", "m", hours, last) is not None) == stands_out
    assert len(anomalies.added(hours, last + 24 * 100, Decimal(1))) == 1, "what is long ago goes"


def test_an_anomaly_is_an_event_that_rules_may_act_upon() -> None:
    story = a_run()
    rule = {"name": "r", "on": "dev.fedtide.cost.anomaly", "where": "value == 'us'", "do": StartRun(app=APP)}
    story.tell(_applied(rule))
    for day in range(10):
        used = HOUR if day < 9 else Usage(cpu_us=20 * HOUR.cpu_us)
        story.tell(UsageReported(source="c", items=[UsedFor(region="us", phase="serve", usage=used)]), after_s=86_400)
    assert story.world.triggers["r"].fired == 0, "the hour is not over"
    story.tell(UsageReported(source="c", items=[UsedFor(region="us", phase="serve", usage=HOUR)]), after_s=3600)
    assert story.world.triggers["r"].fired == 1


def test_a_narrow_price_goes_before_a_wide_one_and_a_discount_is_told() -> None:
    prices = [
        Price(meter="gpu", price=Decimal(3), per="hour"),
        Price(meter="gpu", price=Decimal(1), list_price=Decimal(3), per="hour", pool="spot"),
        Price(meter="gpu", price=Decimal(2), per="hour", region="eu"),
    ]
    valuer = Valuer(PriceBook(prices=prices))
    line = Line(0, 0, "eu", "spot", "aggregate", "useful", "gpu")
    assert valuer.cost(line, 3_600_000_000) == Cost(Decimal(1), Decimal(3))
    assert valuer.cost(line._replace(pool="other"), 3_600_000_000).cost == Decimal(2)
    assert valuer.cost(line._replace(meter="cpu"), 10**9).cost == 0


@pytest.mark.parametrize("ends", ["cancel", "pause", "fail"])
def test_what_is_set_aside_for_a_round_is_free_again_when_its_run_ends_or_pauses(ends: str) -> None:
    """Also if reports of it come late: otherwise everything else would be held for ever."""
    story = a_run()
    story.tell(budget("1", when_spent="hold"), opened(2, "a"))
    assert story.world.budgets["b"].set_aside > 0
    end = {
        "cancel": RunCancelRequested(run="run-1", reason="no"),
        "pause": RunPauseRequested(run="run-1"),
        "fail": RunFailed(run="run-1", attempt=1, reason="x"),
    }[ends]
    story.tell(end, opened(3, "a"))
    assert story.world.budgets["b"].set_aside == 0
    story.tell(requested("run-2"))
    assert holds(story.world, "run-2", 1) is None


def test_a_run_whose_last_round_is_not_settled_waits_for_it() -> None:
    """Its question may overtake the report that the round is closed."""
    story = a_run()
    story.tell(budget("1", when_spent="hold"), opened(2, "a"))
    assert holds(story.world, "run-1", 2) is None, "what has begun is brought to its end"
    assert "waits for the end of round 2" in (holds(story.world, "run-1", 3) or "")
    story.tell(closed(2))
    assert holds(story.world, "run-1", 3) is None


def test_a_budget_that_is_raised_and_used_up_again_pauses_again_and_others_are_let_alone() -> None:
    story = a_run(model="m")
    story.tell(budget("0.05", when_spent="hold", tell_at=[0.5], scope={"model": "m"}))
    story.tell(
        RunCompleted(run="run-1", attempt=1), published(), rollout(wave("eu", "a"), wave("us", "", "b"), key="ro-2")
    )
    used = received(1, "a", usage=HOUR)
    story.tell(used)
    assert _state(story) == "paused", "at the amount, whatever is told"
    story.tell(budget("0.1", when_spent="hold", tell_at=[0.5], scope={"model": "m"}))
    assert story.world.budgets["b"].told == ("actual 0.5",)
    story.tell(RolloutResumeRequested(rollout="ro-2"))
    story.tell(BudgetApplied(budget=Budget(name="other", amount=Decimal(1), tell_at=[0.001], scope={"model": "x"})))
    assert _state(story) == "rolling"
    story.tell(received(2, "a", usage=HOUR))
    assert _state(story) == "paused"


def test_a_new_day_begins_with_the_averages_of_the_days_before() -> None:
    story = a_run()
    story.tell(BudgetApplied(budget=Budget(name="b", amount=Decimal(1), period="day", when_spent="hold")))
    story.tell(received(1, "a", usage=HOUR), closed(1))
    tomorrow = story.events[-1].time + timedelta(days=1)
    kept = budgets.in_period(story.world.budgets["b"], tomorrow)
    assert kept.spent == 0
    assert Decimal("0.06") < budgets.expected(kept, "run-1") < Decimal("0.1")


@pytest.mark.parametrize("exits_first", [False, True])
def test_the_end_of_an_aggregator_may_be_known_before_its_last_report(exits_first: bool) -> None:
    story = a_run()
    told = [
        closed(1).model_copy(update={"usage": HOUR}),
        AggregatorExited(run="run-1", attempt=1, code=1, usage=HOUR + HOUR),
    ]
    story.tell(*(reversed(told) if exits_first else told))
    assert quantity(story.world, "cpu") == 2 * HOUR.cpu_us


def test_an_aggregator_that_was_told_to_end_has_not_crashed() -> None:
    story = a_run()
    story.tell(RunPauseRequested(run="run-1"), AggregatorExited(run="run-1", attempt=1, code=143, usage=HOUR))
    assert set(spent(story.world, "outcome", meter="cpu")) == {("useful",)}


def test_reports_that_change_nothing_are_booked_once_and_none_more_than_a_release_is_large() -> None:
    story = a_run(model="m")
    story.tell(RunCompleted(run="run-1", attempt=1), published(), rollout(wave("eu", "", "a"), key="ro-1"))
    before = quantity(story.world, "wan_down", rollout="ro-1")
    for _ in range(5):
        story.tell(phase("a", "confirmed").model_copy(update={"wan_bytes": 2**50}))
    story.tell(phase("stranger", "confirmed").model_copy(update={"wan_bytes": 2**50}))
    assert quantity(story.world, "nodes_updated") == 1
    assert quantity(story.world, "wan_down", rollout="ro-1") - before <= 10
    opens = opened(2, "a", bytes_down=10, wan_bytes=10)
    story = a_run()
    story.tell(opens, AggregatorStarted(run="run-1", attempt=2), opens.model_copy(update={"attempt": 2}))
    assert quantity(story.world, "wan_down", round="2") == 10, "a resumed aggregator sends nothing again"


def test_the_cloud_and_nodes_without_a_pool_have_prices_by_the_names_that_are_shown() -> None:
    prices = [Price(meter="cpu", price=Decimal(1), per="hour", region="cloud")]
    prices.append(Price(meter="memory", price=Decimal(1), per="GB-hour", pool="other"))
    valuer = Valuer(PriceBook(prices=prices))
    assert valuer.cost(Line(0, 0, "", "", "coordinate", "useful", "cpu"), HOUR.cpu_us).cost == 1
    assert valuer.cost(Line(0, 0, "eu", "", "idle", "useful", "memory"), 3_600_000_000).cost == 1


def test_a_release_that_was_made_elsewhere_names_nobodys_costs() -> None:
    story = a_run()
    story.tell(UsageReported(source="c", items=[UsedFor(phase="serve", usage=HOUR)]), published(run=""))
    assert set(spent(story.world, "release")) == {("unallocated",)}


def test_old_hours_of_nobody_are_summed_up_by_day_and_cost_the_same() -> None:
    story = a_run()
    for _ in range(30):
        story.tell(UsageReported(source="c", items=[UsedFor(region="us", phase="idle", usage=HOUR)]), after_s=3600)
    ((_, before),) = spent(story.world).items()
    lines = len(story.world.ledger[""].lines)
    story.tell(UsageReported(source="c", items=[UsedFor(region="us", phase="idle")]), after_s=60 * 86_400)
    story.tell(UsageReported(source="c", items=[UsedFor(region="us", phase="idle", usage=HOUR)]), after_s=60)
    assert len(story.world.ledger[""].lines) < lines / 5
    assert spent(story.world)[()] == before + Decimal("0.04")


def test_an_aggregator_cannot_make_up_regions() -> None:
    story = a_run()
    used = {name: Usage(cpu_us=7) for name in ("eu", "x1", "x2")}
    story.tell(opened(1, "a"), RoundClosed(run="run-1", attempt=1, round=1, metrics={}, seconds=1.0, regional=used))
    regions = {line.split("/")[2] for line in story.world.ledger["run-1"].lines}
    assert "eu" in regions and not {"x1", "x2"} & regions


def test_a_round_that_is_closed_again_after_a_crash_is_booked_once() -> None:
    """It was reported as closed, and the aggregator died before its checkpoint was stored."""
    story = a_run()
    story.tell(received(1, "a", usage=HOUR), closed(1), AggregatorStarted(run="run-1", attempt=2))
    story.tell(received(1, "a", usage=HOUR, attempt=2), closed(1, attempt=2))
    assert quantity(story.world, "cpu") == HOUR.cpu_us
    assert (quantity(story.world, "updates"), quantity(story.world, "rounds")) == (1, 1)

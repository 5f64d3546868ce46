"""Gates of a roll-out: what the nodes measured, against what the plan allows. Pure.

Fail closed: a gate that cannot be evaluated is an error, never a pass; one without enough evidence
is inconclusive and says about how much is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from fedtide.coordinator.conditions import holds, names
from fedtide.coordinator.rollouts import sequential_test
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.views import GateOutcome
from fedtide.fabric.plans.rollout_plan import (
    SLOWER,
    UNANSWERED,
    DisagreementGate,
    Gate,
    InferenceErrorGate,
    LatencyGate,
    Measured,
    MetricGate,
    PairedGate,
    QueryGate,
)

Outcome = GateOutcome


@dataclass(frozen=True, slots=True)
class Judgement:
    """One gate now: `reason` has the metric, its value, the threshold and n."""

    gate: str
    outcome: Outcome
    reason: str
    enforced: bool = True
    value: float = 0.0
    n: int = 0
    more: int = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """To one question so far: the last one, and how many in a row were as good, or as bad, or none at all.

    `at`: when the last one came.
    """

    value: float | None = None
    reason: str = ""
    is_good: bool = False
    in_a_row: int = 0
    at: datetime | None = None


UNASKED = Answers()


def after_answer(gate: QueryGate, before: Answers, value: float | None, reason: str, at: datetime | None) -> Answers:
    """With one more answer; no value: `reason` says why."""
    is_good = value is not None and not (
        (gate.most is not None and value > gate.most) or (gate.least is not None and value < gate.least)
    )
    is_same = (before.value is None, before.is_good) == (value is None, is_good)
    return Answers(value, reason, is_good, before.in_a_row + 1 if is_same else 1, at)


def total(parts: Iterable[Measured]) -> Measured:
    """The sum of what nodes measured."""
    known = [part for part in parts if part is not NOTHING]
    return Measured.model_validate({name: sum(getattr(p, name) for p in known) for name in Measured.model_fields})


NOTHING = Measured()
"""The measurements of a node that has not reported yet."""


def judge(
    gate: Gate, measured: Mapping[str, Measured], slices: Mapping[str, Sequence[str]], answers: Answers = UNASKED
) -> Judgement:
    """One gate over the nodes of a stage.

    Args:
        measured: by node, of those that serve the candidate.
        slices: nodes by `label=value`.
        answers: to the question of a query gate.
    """
    whole = total(measured.values())
    match gate:
        case PairedGate(tolerance=tolerance, slice_tolerance=floor):
            parts = _slices(gate.slices, measured, slices)
            alpha = gate.alpha / (1 + len(parts))
            whole_and_parts = [("", whole, tolerance), *((name, part, floor) for name, part in parts)]
            return _worst([_paired(gate, name, part, limit, alpha) for name, part, limit in whole_and_parts])
        case DisagreementGate(most=most, slice_most=ceiling):
            parts = _slices(gate.slices, measured, slices)
            shares = [("", whole, most), *((name, part, ceiling) for name, part in parts)]
            alpha = gate.alpha / len(shares)
            return _worst(
                [_share(gate, name, part.disagreed, part.shadowed, limit, alpha) for name, part, limit in shares]
            )
        case LatencyGate():
            return _share(gate, f"{SLOWER:g} times slower", whole.slower, whole.shadowed, 0.5, gate.alpha)
        case InferenceErrorGate(most=most):
            return _share(gate, "", whole.errors, whole.inferences + whole.errors, most, gate.alpha)
        case MetricGate():
            return _metric(gate, whole)
        case QueryGate():
            return _query(gate, answers)
        case _:
            assert_never(gate)


_SHARES = frozenset({"latency_mean_ms", "error_rate", "disagreement", "accuracy_difference"})
FIELDS = frozenset(Measured.model_fields) | _SHARES
"""What the expressions of metric gates may name."""


def fields(whole: Measured) -> dict[str, bool | int | float | str]:
    """The values that metric gates may use: totals, and ratios whose denominator is not zero."""
    shares: dict[str, float] = {}
    if whole.inferences:
        shares["latency_mean_ms"] = whole.latency_ms / whole.inferences
    if whole.inferences + whole.errors:
        shares["error_rate"] = whole.errors / (whole.inferences + whole.errors)
    if whole.shadowed:
        shares["disagreement"] = whole.disagreed / whole.shadowed
    if scored := whole.wins + whole.losses + whole.ties:
        shares["accuracy_difference"] = (whole.wins - whole.losses) / scored
    return {**whole.model_dump(), **shares}


def _slices(
    labels: Sequence[str], measured: Mapping[str, Measured], slices: Mapping[str, Sequence[str]]
) -> list[tuple[str, Measured]]:
    """The measurements of each slice with a node in the stage; a label that no node has gives a slice without data."""
    found = []
    for label in labels:
        mine = {name: nodes for name, nodes in slices.items() if name.startswith(f"{label}=")}
        parts = {name: [measured[n] for n in nodes if n in measured] for name, nodes in mine.items()}
        present = {name: part for name, part in parts.items() if part} or {f"{label}=?": []}
        found += [(name, total(part)) for name, part in sorted(present.items())]
    return found


def _paired(gate: PairedGate, where: str, part: Measured, tolerance: float, alpha: float) -> Judgement:
    counts = {1.0: part.wins, -1.0: part.losses, 0.0: part.ties}
    verdict = sequential_test.judge(counts, -max(tolerance, 1e-6), -1.0, 1.0, alpha)
    text = f"accuracy {verdict.mean:+.4f} against the incumbent, allowed -{tolerance:g}, n {verdict.n}"
    return _judgement(gate, where, verdict.above, verdict.below, text, verdict)


def _share(gate: Gate, where: str, count: int, n: int, most: float, alpha: float) -> Judgement:
    verdict = sequential_test.judge({1.0: count, 0.0: n - count}, most, 0.0, 1.0, alpha)
    text = f"share {verdict.mean:.4f}, allowed {most:g}, n {verdict.n}"
    return _judgement(gate, where, verdict.below, verdict.above, text, verdict)


def _judgement(gate: Gate, where: str, good: bool, bad: bool, text: str, verdict: sequential_test.Verdict) -> Judgement:
    outcome: Outcome = "pass" if good else "fail" if bad else "inconclusive"
    missing = f"; needs about {verdict.more} more" if outcome == "inconclusive" else ""
    reason = f"{gate.kind}{f' {where}' if where else ''}: {text}{missing}"
    return Judgement(gate.kind, outcome, reason, gate.enforce, verdict.mean, verdict.n, verdict.more)


_ORDER: tuple[Outcome, ...] = ("error", "fail", "inconclusive", "pass")


def _worst(parts: Sequence[Judgement]) -> Judgement:
    return min(parts, key=lambda part: (_ORDER.index(part.outcome), -part.more))


def _metric(gate: MetricGate, whole: Measured) -> Judgement:
    known = fields(whole)
    missing = sorted((names(gate.pass_if) | names(gate.fail_if)) & _SHARES - known.keys())
    if missing:
        reason = f"metric: no node has reported {missing[0]} yet"
        return Judgement(gate.kind, "inconclusive", reason, gate.enforce, more=1)
    try:
        bad, good = holds(gate.fail_if, known), holds(gate.pass_if, known)
    except ConfigError as exc:
        return Judgement(gate.kind, "error", f"metric: {exc}", gate.enforce)
    n = whole.inferences
    if bad:
        return Judgement(gate.kind, "fail", f"metric: {gate.fail_if}, with {_shown(known)}", gate.enforce, n=n)
    if good:
        return Judgement(gate.kind, "pass", f"metric: {gate.pass_if}", gate.enforce, n=n)
    return Judgement(gate.kind, "inconclusive", f"metric: not yet {gate.pass_if}", gate.enforce, n=n, more=max(1, n))


def _query(gate: QueryGate, answers: Answers) -> Judgement:
    bounds = [f"at {word} {b:g}" for word, b in (("least", gate.least), ("most", gate.most)) if b is not None]
    allowed, times = " and ".join(bounds), f"{answers.in_a_row} of {{}} in a row"
    if answers.value is None:
        outcome: Outcome = "error" if answers.in_a_row >= UNANSWERED else "inconclusive"
        told = f"no value ({times.format(UNANSWERED)}): {answers.reason}" if answers.in_a_row else "not asked yet"
        return Judgement(gate.kind, outcome, f"query: {told}", gate.enforce, more=1)
    text = f"query: {answers.value:g}, allowed {allowed}, {times.format(gate.times)}"
    n, value = answers.in_a_row, answers.value
    if n < gate.times:
        return Judgement(gate.kind, "inconclusive", text, gate.enforce, value, n, gate.times - n)
    return Judgement(gate.kind, "pass" if answers.is_good else "fail", text, gate.enforce, value, n)


def _shown(known: Mapping[str, object]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in known.items() if isinstance(v, float) and math.isfinite(v) and v)

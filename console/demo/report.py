"""The demo's report: what happened, and whether all of it really did. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from fedtide.fabric.messages.views import RolloutView, RoundView, RunView
from fedtide.fabric.strict import Strict

MIN_ACCURACY = 0.90
MAX_GAP = 0.04
MIN_SENSORS_ACCURACY = 0.5
MAX_ONNX_DIFFERENCE = 1e-4


class RoundRow(Strict):
    round: int
    accuracy: float
    participants: int
    bytes_up: int
    bytes_down: int
    seconds: float


class Accuracy(Strict):
    initial: float
    federated: float
    centralised: float


class ReleaseRow(Strict):
    digest: str
    onnx_max_abs_diff: float
    signed_by: list[str] = Field(default=[], description="Roles that vouch for it, as it was verified")


class RolloutRow(Strict):
    region: str
    confirmed: int
    failed: int
    seconds: float


class InferenceRow(Strict):
    requests: int
    dropped: int
    swapped_at_request: int | None = Field(description="Index of the first answer by the new release; None: never")


class DemoReport(Strict):
    """Written to `demo-report.json`."""

    ok: bool
    seconds: float
    nodes: int
    regions: list[str]
    rounds: list[RoundRow]
    accuracy: Accuracy
    release: ReleaseRow
    rollout: list[RolloutRow]
    inference: InferenceRow
    trained_with: str = "flower"
    sensors_accuracy: float | None = Field(default=None, description="Second example; only without torch")
    problems: list[str] = []


def accuracy_of(view: RoundView) -> float:
    """The accuracy of a closed round; 0 if it is not a number."""
    return view.metrics.get("accuracy") or 0.0


def round_rows(run_views: Sequence[RunView]) -> list[RoundRow]:
    """The training rounds of several runs, numbered through."""
    rows: list[RoundRow] = []
    for view in run_views:
        for each in view.rounds:
            if each.round == 0 or each.state != "closed":
                continue
            rows.append(
                RoundRow(
                    round=len(rows) + 1,
                    accuracy=accuracy_of(each),
                    participants=len(each.phases["train"].received),
                    bytes_up=each.bytes_up,
                    bytes_down=each.bytes_down,
                    seconds=each.seconds or 0.0,
                )
            )
    return rows


def rollout_rows(view: RolloutView) -> list[RolloutRow]:
    return [
        RolloutRow(region=r.region, confirmed=r.confirmed, failed=r.failed, seconds=r.seconds or 0.0)
        for r in view.regions
    ]


def problems(report: DemoReport) -> list[str]:
    """Everything that did not go as it should; empty means the main job works."""
    accuracy, inference = report.accuracy, report.inference
    claims = {
        f"federated accuracy {accuracy.federated:.3f} is under {MIN_ACCURACY}": accuracy.federated < MIN_ACCURACY,
        f"federated is more than {MAX_GAP} under centralised": accuracy.centralised - accuracy.federated > MAX_GAP,
        "training did not improve the model": accuracy.federated <= accuracy.initial,
        "no round was closed": not report.rounds,
        "a node missed a round": any(r.participants < report.nodes for r in report.rounds),
        "a round moved no bytes": any(not r.bytes_up or not r.bytes_down for r in report.rounds),
        "ONNX and torch disagree": report.release.onnx_max_abs_diff > MAX_ONNX_DIFFERENCE,
        "not every node confirmed the release": sum(r.confirmed for r in report.rollout) != report.nodes,
        "a node failed the roll-out": any(r.failed for r in report.rollout),
        "no inference was made": inference.requests == 0,
        f"{inference.dropped} inference requests were dropped": inference.dropped > 0,
        "the second example learnt little": (report.sensors_accuracy or 1.0) < MIN_SENSORS_ACCURACY,
        "the new release never answered": inference.swapped_at_request is None,
    }
    return [claim for claim, wrong in claims.items() if wrong]

"""Runs as MLflow keeps them (mlflow.org/docs/latest/ml/tracking): found again by a tag, so any process may go on."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

from fedtide.coordinator.tracking.record import RunRecord

# Before its import: a server that hangs is given up soon (it is tried again).
os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}

RUN, ROUNDS = "fedtide.run", "fedtide.rounds"
"""Tags: which run it is, and up to which round its metrics are there."""
_STATUS = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
_LONGEST_PARAM, _BATCH = 6000, 900


@cache
def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def report(record: RunRecord) -> None:
    """Bring the run in MLflow up to `record`; again changes nothing.

    Raises:
        mlflow.exceptions.MlflowException: the server refuses, or is not there.
    """
    client = _client(record.mlflow)
    run = _found(client, record) or _created(client, record)
    tags: dict[str, str] = run.data.tags
    for name, value in record.tags.items():
        if tags.get(name) != value:
            client.set_tag(run.info.run_id, name, value)
    _report_rounds(client, run.info.run_id, int(tags.get(ROUNDS, "-1")), record)
    if record.outcome != "running":
        if run.info.status != _STATUS[record.outcome]:
            for file in record.files.values():
                client.log_artifact(run.info.run_id, str(file))
            client.set_terminated(run.info.run_id, _STATUS[record.outcome], _ms(record.ended or record.began))
    elif run.info.status != "RUNNING":  # it goes on after its end
        client.update_run(run.info.run_id, status="RUNNING")


def _found(client: Any, record: RunRecord) -> Any:
    experiment = client.get_experiment_by_name(record.experiment)
    if experiment is None:
        return None
    runs = client.search_runs([experiment.experiment_id], f"tags.`{RUN}` = '{record.run}'", max_results=1)
    return runs[0] if runs else None


def _created(client: Any, record: RunRecord) -> Any:
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(record.experiment)
    try:
        key = experiment.experiment_id if experiment is not None else client.create_experiment(record.experiment)
    except MlflowException:
        made = client.get_experiment_by_name(record.experiment)  # another coordinator was quicker
        if made is None:
            raise
        key = made.experiment_id
    run = client.create_run(key, start_time=_ms(record.began), tags={RUN: record.run}, run_name=record.run)
    params = [Param(_name(k), v[:_LONGEST_PARAM]) for k, v in record.params.items()]
    client.log_batch(run.info.run_id, params=params)
    return run


def _report_rounds(client: Any, run_id: str, have: int, record: RunRecord) -> None:
    from mlflow.entities import Metric, RunTag

    for each in record.rounds:
        if each.round <= have:
            continue
        metrics = [Metric(_name(k), v, _ms(each.at), each.round) for k, v in each.metrics.items()]
        for start in range(0, len(metrics), _BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
        client.log_batch(run_id, tags=[RunTag(ROUNDS, str(each.round))])


def _name(key: str) -> str:
    """MLflow takes letters, digits, and these signs in names."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:250]


def _ms(at: float) -> int:
    return int(at * 1000)

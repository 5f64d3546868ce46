"""Runs as MLflow keeps them (mlflow.org/docs/latest/ml/tracking): found again by a tag, so any process may go on."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from fedtide.coordinator.tracking.record import RunRecord

# Before its import: a server that hangs is given up soon (it is tried again).
os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}

RUN, ROUNDS, PARAMS = "fedtide.run", "fedtide.rounds", "fedtide.params"
"""Tags: which run it is, up to which round its metrics are there, and whether its parameters are."""
_STATUS = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
_LONGEST_PARAM, _MOST_PARAMS, _BATCH = 6000, 100, 900
_OF_THE_SERVER = ("mlflow-artifacts", "http", "https")


@cache
def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def report(record: RunRecord) -> bool:
    """Bring the run in MLflow up to `record`; again changes nothing.

    Returns:
        Whether it has ended and its artefacts are wanted, to be reported with them.

    Raises:
        mlflow.exceptions.MlflowException: the server refuses, or is not there.
    """
    client = _client(record.mlflow)
    run = _found(client, record) or _created(client, record)
    key, tags = run.info.run_id, run.data.tags
    if PARAMS not in tags:
        _report_params(client, key, record)
    for name, value in record.tags.items():
        if tags.get(name) != value:
            client.set_tag(key, name, value)
    _report_rounds(client, key, int(tags.get(ROUNDS, "-1")), record)
    if record.outcome == "running":
        if run.info.status != "RUNNING":  # it goes on after its end
            client.update_run(key, status="RUNNING")
        return False
    if run.info.status == _STATUS[record.outcome]:
        return False
    if record.files is None:
        return True
    scheme = urlsplit(run.info.artifact_uri or "").scheme
    if scheme in (*_OF_THE_SERVER, *record.artifact_schemes):
        for file in record.files.values():
            client.log_artifact(key, str(file))
    else:  # else a server could have files written wherever this process may write
        client.set_tag(key, "fedtide.artifacts", f"not put to {scheme or 'a path'}: see tracking.artifact_schemes")
    client.set_terminated(key, _STATUS[record.outcome], _ms(record.ended or record.began))
    return False


def _found(client: Any, record: RunRecord) -> Any:
    experiment = client.get_experiment_by_name(record.experiment)
    if experiment is None:
        return None
    runs = client.search_runs([experiment.experiment_id], f"tags.`{RUN}` = '{record.run}'", max_results=1)
    return runs[0] if runs else None


def _created(client: Any, record: RunRecord) -> Any:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(record.experiment)
    try:
        key = experiment.experiment_id if experiment is not None else client.create_experiment(record.experiment)
    except MlflowException:
        made = client.get_experiment_by_name(record.experiment)  # another coordinator was quicker
        if made is None:
            raise
        key = made.experiment_id
    return client.create_run(key, start_time=_ms(record.began), tags={RUN: record.run}, run_name=record.run)


def _report_params(client: Any, run_id: str, record: RunRecord) -> None:
    from mlflow.entities import Param, RunTag

    params = [Param(_name(k), v[:_LONGEST_PARAM]) for k, v in record.params.items()]
    for start in range(0, len(params), _MOST_PARAMS):
        client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
    client.log_batch(run_id, tags=[RunTag(PARAMS, "reported")])


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

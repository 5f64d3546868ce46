"""Runs one task from a bundle: takes a Flower message, and returns the reply that a ClientApp would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.edge_agent.training import control_variates
from fedtide.edge_agent.training.onnx import records
from fedtide.edge_agent.training.onnx.batches import Batches
from fedtide.edge_agent.training.onnx.errors import WrongModel, WrongTask
from fedtide.edge_agent.training.onnx.learning import TrainingParams, learn, measure
from fedtide.edge_agent.training.update_coding import RESIDUAL, code
from fedtide.fabric.ids import flower_int
from fedtide.fabric.messages.scaffold import CHANGE, CONTROL
from fedtide.fabric.messages.tasks import Arrays, Task, Values
from fedtide.fabric.strict import ConfigValues, Scalar
from fedtide.fabric.tensors.codecs import Codec
from fedtide.fabric.tensors.frame import Tensor
from fedtide.fabric.tensors.training_bundle import BundleManifest, TrainingBundle

Array = npt.NDArray[Any]
_OWN = "fedtide.scaffold"
_TOGETHER, _MOST_TOGETHER = 4, 256
"""Training batches in one evaluation batch, which needs less memory for each; most samples in one."""


@dataclass(frozen=True, slots=True)
class TaskContext:
    """The inputs of a task besides its message."""

    bundle: TrainingBundle
    batches: Batches
    blobs: Mapping[str, Path]
    state: Mapping[str, Tensor]
    """The run's state on this node."""
    node_id: int
    threads: int
    progress: Path
    checkpoint_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    records: dict[str, list[Tensor]]
    metrics: dict[str, float]
    state: dict[str, Tensor]


def perform(task: Task, context: TaskContext) -> Answer:
    """Train or evaluate, as the message asks.

    Raises:
        WrongTask, WrongModel, WrongData, GraphMismatch: this task cannot be done with this bundle.
    """
    manifest, message = context.bundle.manifest, task.message
    check_config(manifest, task.run_config)
    name = records.model_record(message)
    part = (message.content or {})[name]
    assert isinstance(part, Arrays)
    came = records.tensors_of(part, context.blobs)
    values = model_values(context.bundle, came)
    match message.message_type.split(".")[0]:
        case "train":
            return _train(task, context, name, came, values)
        case "evaluate":
            found = measure(context.bundle, context.batches, values, _together(manifest, task), context.threads)
            named = {manifest.evaluation_loss if k == "loss" else k: v for k, v in found.items()}
            return Answer({}, {**named, "num-examples": context.batches.samples}, dict(context.state))
        case other:
            raise WrongTask(f"a training bundle answers train and evaluate messages, not {other!r}", _WITH_FLOWER)


def _train(task: Task, context: TaskContext, name: str, came: dict[str, Tensor], values: dict[str, Array]) -> Answer:
    manifest, config = context.bundle.manifest, records.config_of(task.message)
    params = params_of(manifest, task.run_config, config)
    given = dict(values)
    if manifest.proximal:
        given["mu"] = np.array(_number(config, "proximal-mu", 0.0), np.float32)
        given |= {f"anchor.{p.name}": values[f"param.{p.name}"] for p in manifest.parameters}
    control = _control(task, context)
    own = control_variates.own_control(control, _numpy(context.state, f"{_OWN}."))
    moved = control_variates.correction(control, own)
    given |= {f"correction.{p.name}": moved[p.name] for p in manifest.parameters if p.name in moved}
    result = learn(
        context.bundle, context.batches, given, params, context.threads, context.progress, context.checkpoint_s
    )
    went = {k: _went(t, result.values) for k, t in came.items()}
    metrics = {manifest.train_loss: result.loss, "num-examples": context.batches.samples}
    if manifest.report_steps:
        metrics["num-steps"] = result.steps
    answer = Answer({name: list(went.values())}, metrics, dict(context.state))
    if control and result.steps * params.rate:
        before, after = ({k: t.numpy() for k, t in tensors.items()} for tensors in (came, went))
        new = control_variates.renewed(control, own, before, after, result.steps, params.rate)
        answer.records[CHANGE] = [Tensor.of(k, new[k] - own[k]) for k in control]
        answer.state.update({f"{_OWN}.{k}": Tensor.of(f"{_OWN}.{k}", v) for k, v in new.items()})
    return _coded(task, context, name, came, answer) if task.codec and not control else answer


def _coded(task: Task, context: TaskContext, name: str, came: dict[str, Tensor], answer: Answer) -> Answer:
    seed = flower_int(f"{context.node_id}.{task.message.message_id}")
    residual = _numpy(context.state, f"{RESIDUAL}.")
    coded, left = code(Codec.parse(task.codec), answer.records[name], came, residual, seed)
    kept = {f"{RESIDUAL}.{t.name}": Tensor.of(f"{RESIDUAL}.{t.name}", t.numpy()) for t in left or []}
    return Answer({name: coded}, answer.metrics, {**answer.state, **kept})


def check_config(manifest: BundleManifest, run_config: ConfigValues) -> None:
    """Raises WrongTask: the run sets something else than what the graphs were made with."""
    for key, made in manifest.fixed.items():
        if key in run_config and run_config[key] != made:
            raise WrongTask(
                f"the training bundle was made with {key}={made!r}, the run says {run_config[key]!r}",
                "Start the run with `--train onnx`, which makes the bundle that it needs",
            )


def params_of(manifest: BundleManifest, run_config: ConfigValues, message: ConfigValues) -> TrainingParams:
    """The training parameters. The message overrides the run config; the seed is its seed plus the round.

    Raises:
        WrongTask: a value is missing or no such number.
    """
    given = {**run_config, **message}
    keys = manifest.settings
    epochs, batch = (int(_number(given, key)) for key in (keys.epochs, keys.batch_size))
    rate = _number(given, keys.learning_rate)
    if epochs < 1 or batch < 1:
        raise WrongTask(f"{keys.epochs} is {epochs} and {keys.batch_size} is {batch}: they must be positive")
    return TrainingParams(
        epochs, batch, rate, int(_number(given, keys.seed, 0)) + int(_number(given, "server-round", 0))
    )


def _together(manifest: BundleManifest, task: Task) -> int:
    batch = _number(task.run_config, manifest.settings.batch_size, _MOST_TOGETHER)
    return max(1, min(_MOST_TOGETHER, _TOGETHER * int(batch)))


def _number(values: ConfigValues, key: str, default: Scalar | None = None) -> float:
    found = values.get(key, default)
    if not isinstance(found, int | float):
        raise WrongTask(
            f"neither the run config nor the message has a number {key!r}",
            "Name the app's own key in the plan's settings, or declare this one in the app's config",
        )
    return found


def model_values(bundle: TrainingBundle, came: Mapping[str, Tensor]) -> dict[str, Array]:
    """The model of a message by the names of the graph's inputs; missing values are those of the bundle.

    Raises:
        WrongModel: a parameter is missing or has another form.
    """
    manifest, initial = bundle.manifest, bundle.initial()
    values = {}
    for kind, specs in (("param", manifest.parameters), ("frozen", manifest.frozen), ("buffer", manifest.buffers)):
        for spec in specs:
            tensor = came.get(spec.name) or (None if kind == "param" else initial.get(spec.name))
            if tensor is None:
                raise WrongModel(f"the message carries no parameter {spec.name!r}, which the bundle trains", _OTHER)
            if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise WrongModel(
                    f"{spec.name!r} came as {tensor.dtype} {tensor.shape}, the bundle trains {spec.dtype} {spec.shape}",
                    _OTHER,
                )
            values[f"{kind}.{spec.name}"] = tensor.numpy()
    return values


def _control(task: Task, context: TaskContext) -> dict[str, Array]:
    part = (task.message.content or {}).get(CONTROL)
    if not isinstance(part, Arrays):
        return {}
    if not context.bundle.manifest.controls:
        raise WrongTask("the strategy sends control variates, for which the bundle was not made", "Set `controls=True`")
    return {k: t.numpy() for k, t in records.tensors_of(part, context.blobs).items()}


def _went(tensor: Tensor, values: Mapping[str, Array]) -> Tensor:
    for kind in ("param", "buffer"):
        if (found := values.get(f"{kind}.{tensor.name}")) is not None:
            return Tensor.of(tensor.name, found)
    return tensor


def _numpy(state: Mapping[str, Tensor], prefix: str) -> dict[str, Array]:
    return {k.removeprefix(prefix): t.numpy() for k, t in state.items() if k.startswith(prefix)}


def content(answer: Answer, arrays: Mapping[str, Arrays]) -> dict[str, Arrays | Values]:
    """The answer's records as a message carries them."""
    return {**arrays, "metrics": Values(kind="metrics", values=dict(answer.metrics))}


_WITH_FLOWER = "Nodes that are to answer it need flwr: pip install 'fedtide[train]'"
_OTHER = "The app's model and its training plan are not the same: export the training again"

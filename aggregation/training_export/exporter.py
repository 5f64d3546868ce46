"""From a training plan to a proven training bundle."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedtide.aggregation.training_export import step
from fedtide.aggregation.training_export.noise import FedNoise
from fedtide.aggregation.training_export.optimisers import Sgd
from fedtide.aggregation.training_export.plan import TrainingPlan
from fedtide.aggregation.training_export.proof import prove
from fedtide.aggregation.training_export.tracing import NotExportable, to_onnx
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors import frame as tensors
from fedtide.fabric.tensors.training_bundle import (
    EVALUATE,
    INFER,
    INITIAL,
    TRAIN,
    BundleManifest,
    BundleTensor,
    frame,
    pack,
    spec_of,
)

log = logging.getLogger(__name__)

_BATCHES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)


def export(plan: TrainingPlan, fixed: ConfigValues | None = None) -> bytes:
    """The bundle's file (fedtide.fabric.tensors.training_bundle), after a proof against torch.

    Args:
        fixed: run config values that the plan was built from; a task with other values is refused.

    Raises:
        ConfigError: the plan does not fit together.
        NotExportable: names the operator.
        TrainingDiffers: the results of ONNX Runtime differ from torch's.
    """
    _check(plan)
    plan = _with_own_batch(plan)
    parts, batch = step.Parts.of(plan), step.batch_arguments(plan)
    noise = _noise(plan)
    drawn = [torch.rand(n.shape_for(len(plan.target))) for n in noise]
    per_sample = dict.fromkeys(batch, 1) | {f"noise.{i}": n.per_sample for i, n in enumerate(noise)}
    model = step.model_arguments(parts)
    log.info("training_export.tracing")
    first = step.train_arguments(plan, parts, drawn, batch)
    graphs = {TRAIN: to_onnx(lambda g: step.train(plan, g), first, per_sample)}
    resting = replace(plan, module=copy.deepcopy(plan.module).eval())
    graphs[EVALUATE] = to_onnx(lambda g: step.evaluate(resting, g), {**model, **batch}, per_sample)
    inputs = {k: t for k, t in batch.items() if k != "target"}
    graphs[INFER] = to_onnx(lambda g: step.infer(resting, g), {**model, **inputs}, per_sample)
    log.info("training_export.proving")
    smallest = _smallest_batch(plan)
    difference = prove(plan, graphs, noise, smallest)
    manifest = BundleManifest(
        digests={},
        parameters=_specs(parts.trained),
        frozen=_specs(parts.frozen),
        buffers=_specs(parts.buffers),
        slots=list(plan.optimiser.slots),
        inputs=[_of_batch(k, t) for k, t in plan.inputs.items()],
        target=_of_batch("target", plan.target),
        noise=noise,
        outputs=list(step.infer(resting, {**model, **inputs})),
        metrics=list(plan.metrics),
        classes=_classes(resting, {**model, **inputs}),
        smallest_batch=smallest,
        train_loss=plan.train_loss,
        evaluation_loss=plan.evaluation_loss,
        report_steps=plan.report_steps or plan.controls,
        proximal=plan.proximal,
        controls=plan.controls,
        settings=plan.settings,
        fixed=fixed or {},
        data=plan.data,
        preprocessing=list(plan.preprocessing),
        torch_difference=difference,
    )
    kept = [tensors.Tensor.of(k, t.numpy()) for k, t in {**parts.frozen, **parts.buffers}.items()]
    return pack(manifest, {**graphs, INITIAL: frame(kept)})


def _check(plan: TrainingPlan) -> None:
    where = "training plan"
    rows = {len(t) for t in (*plan.inputs.values(), plan.target)}
    if not plan.inputs or len(rows) != 1 or min(rows) < 2:
        raise ConfigError(where, f"inputs and target must be a batch of two or more samples, they have {sorted(rows)}")
    if not any(p.requires_grad for p in plan.module.parameters()):
        raise ConfigError(where, "no parameter requires a gradient")
    if plan.controls and (plan.optimiser != Sgd() or plan.clip_norm is not None):
        raise ConfigError(where, "control variates go with plain SGD: no momentum, decay, clipping or other optimiser")
    names = [k for k, _ in plan.module.named_parameters(remove_duplicate=False)]
    if len(names) != len(dict(plan.module.named_parameters())):
        raise NotExportable("two names share one parameter", "Give each its own, or train this app with torch")


def _with_own_batch(plan: TrainingPlan) -> TrainingPlan:
    """The plan with a batch size that no other dimension has, since tracing identifies equal sizes."""
    module = copy.deepcopy(plan.module).train()
    taken = {n for t in (*module.parameters(), *plan.inputs.values(), plan.target) for n in t.shape[1:] + t.shape[:1]}
    size = next(n for n in _BATCHES if n not in taken)
    rows = torch.arange(size) % len(plan.target)
    inputs = {k: t[rows] for k, t in plan.inputs.items()}
    return replace(plan, module=module, inputs=inputs, target=plan.target[rows])


def _smallest_batch(plan: TrainingPlan) -> int:
    """2 if torch refuses to train on one sample, as batch norm does over single values."""
    module = copy.deepcopy(plan.module)
    with step.plain_kernels(), torch.no_grad():
        try:
            module(*(t[:1] for t in plan.inputs.values()))
        except ValueError:
            return 2
    return 1


def _classes(plan: TrainingPlan, given: step.Arguments) -> int | None:
    """The number of classes of integer labels: the number of columns of the output."""
    outputs = list(step.infer(plan, given).values())
    labels = not plan.target.is_floating_point() and plan.target.dim() == 1
    return outputs[0].shape[1] if labels and len(outputs) == 1 and outputs[0].dim() == 2 else None


def _noise(plan: TrainingPlan) -> list[BundleTensor]:
    """The shapes of the noise that dropout draws, found by running batches of two sizes."""
    once, twice = (_drawn(plan, times) for times in (1, 2))
    rows = len(plan.target)
    found = []
    for index, (small, large) in enumerate(zip(once, twice, strict=True)):
        times = (large[0] - small[0]) // rows if small else 0
        rest = small[0] - times * rows if small else 0
        if small[1:] != large[1:] or (times and rest):
            raise NotExportable(f"dropout number {index} has the batch in another axis than the first")
        first = times if times else (small[0] if small else 0)
        found.append(BundleTensor(name=f"noise.{index}", dtype="F32", shape=(first, *small[1:]), per_sample=times))
    return found


def _drawn(plan: TrainingPlan, times: int) -> list[tuple[int, ...]]:
    module = copy.deepcopy(plan.module)
    with FedNoise() as watched, step.plain_kernels(), torch.no_grad():
        module(*(torch.cat([t] * times) for t in plan.inputs.values()))
    shapes: list[tuple[int, ...]] = watched.shapes
    return shapes


def _specs(group: Mapping[str, Tensor]) -> list[BundleTensor]:
    return [spec_of(k, tensors.Tensor.of(k, t.numpy()).spec) for k, t in group.items()]


def _of_batch(name: str, tensor: Tensor) -> BundleTensor:
    spec = tensors.Tensor.of(name, tensor[:1].numpy()).spec
    return spec_of(name, spec).model_copy(update={"per_sample": 1})

"""Checks a training graph against torch: both take the same steps from the same start.

Torch takes them in float32 and in float64. The difference between these two is rounding (Adam divides a tiny
gradient by its size), and not an error of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from fedtide.aggregation.training_export import step
from fedtide.aggregation.training_export.noise import FedNoise
from fedtide.aggregation.training_export.plan import TrainingPlan
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.tensors.training_bundle import EVALUATE, INFER, TRAIN, BundleTensor

STEPS = 20
BOUND = 1e-5
"""Allowed difference of ONNX Runtime from torch after STEPS steps, relative to a tensor's largest value."""
ROUNDINGS = 4
"""Also allowed: this multiple of the difference of torch in float32 from float64, up to MOST."""
MOST = 1e-2
_SMALLEST = 1e-3


class TrainingDiffers(FedtideError):
    """The training graph does not do what torch does."""


def prove(
    plan: TrainingPlan,
    graphs: Mapping[str, bytes],
    noise: Sequence[BundleTensor],
    smallest: int = 1,
    steps: int = STEPS,
) -> float:
    """The largest relative difference of any parameter, buffer, loss, metric or output.

    Raises:
        TrainingDiffers: it is above BOUND and not explained by rounding, or a graph does not run.
        ConfigError: torch itself diverges.
    """
    batches = _batches(plan, noise, smallest)
    state = step.train_arguments(plan, step.Parts.of(plan), [], {})
    if plan.controls:
        state |= {k: torch.randn(t.shape) * 0.01 for k, t in state.items() if k.startswith("correction.")}
    found = _in_onnx(plan, graphs, state, batches)
    wanted = _in_torch(plan, state, batches, torch.float32)
    exact = _in_torch(plan, state, batches, torch.float64)
    worst = 0.0
    for name, tensor in found.items():
        if not bool(torch.isfinite(wanted[name]).all() and torch.isfinite(exact[name]).all()):
            raise ConfigError(
                "training plan",
                f"torch's own {name} is no finite number after {STEPS} steps on the sample batch",
                "Give inputs of the scale that nodes have after preprocessing",
            )
        off, rounding = _difference(tensor, wanted[name]), _difference(wanted[name], exact[name])
        if not off <= max(BOUND, min(MOST, ROUNDINGS * rounding)):
            raise TrainingDiffers(
                f"after {STEPS} steps {name} differs from torch by {off:.1e} of its size, more than {BOUND:.0e} "
                f"(torch's own rounding: {rounding:.1e})",
                "Report the model to fedtide, or train this app with torch on the nodes",
            )
        worst = max(worst, off)
    return worst


Batch = dict[str, Tensor]


def _batches(plan: TrainingPlan, noise: Sequence[BundleTensor], smallest: int) -> list[Batch]:
    """Batches of whole, half and smallest size in turn, each with its noise."""
    generator = torch.Generator().manual_seed(0)
    rows, found = len(plan.target), []
    for number in range(STEPS):
        chosen = torch.randperm(rows, generator=generator)[: (rows, rows // 2, smallest)[number % 3]]
        drawn = {f"noise.{i}": torch.rand(n.shape_for(len(chosen)), generator=generator) for i, n in enumerate(noise)}
        found.append({**{k: t[chosen] for k, t in step.batch_arguments(plan).items()}, **drawn})
    return found


def _in_onnx(plan: TrainingPlan, graphs: Mapping[str, bytes], state: Batch, batches: Sequence[Batch]) -> Batch:
    train, rate = _Graph(graphs[TRAIN]), torch.tensor(plan.optimiser.usual_rate)
    out: Batch = {}
    for number, batch in enumerate(batches, start=1):
        out = train({**state, **batch, "rate": rate, "step": torch.tensor(number)})
        state = state | {name.removeprefix("new."): t for name, t in out.items() if name.startswith("new.")}
    given = state | step.batch_arguments(plan)
    measured = {f"{graph} {k}": t for graph in (EVALUATE, INFER) for k, t in _Graph(graphs[graph])(given).items()}
    return {**step.group(state, "param."), **step.group(state, "buffer."), "loss": out["loss"], **measured}


def _in_torch(plan: TrainingPlan, state: Batch, batches: Sequence[Batch], dtype: torch.dtype) -> Batch:
    plan = replace(plan, module=copy.deepcopy(plan.module).train().to(dtype))
    trained = [p for p in plan.module.parameters() if p.requires_grad]
    optimiser = plan.optimiser.eager(trained, plan.optimiser.usual_rate)
    state, loss = _as(state, dtype), torch.zeros(())
    for batch in batches:
        loss = _torch_step(plan, optimiser, state, _as(batch, dtype))
    plan.module.eval()
    given = {**step.model_arguments(step.Parts.of(plan)), **_as(step.batch_arguments(plan), dtype)}
    measured = {EVALUATE: step.evaluate(plan, given), INFER: step.infer(plan, given)}
    named = {f"{graph} {k}": t for graph, values in measured.items() for k, t in values.items()}
    return {**plan.module.state_dict(), "loss": loss, **named}


def _as(tensors: Batch, dtype: torch.dtype) -> Batch:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def _torch_step(plan: TrainingPlan, optimiser: torch.optim.Optimizer, state: Batch, batch: Batch) -> Tensor:
    """As an app would write it in torch."""
    optimiser.zero_grad()
    trained = {k: p for k, p in plan.module.named_parameters() if p.requires_grad}
    with FedNoise(list(step.group(batch, "noise.").values())):
        total = loss = plan.loss(plan.module(*step.group(batch, "input.").values()), batch["target"])
    if plan.proximal:
        for name, p in trained.items():
            total = total + state["mu"] / 2 * ((p - state[f"anchor.{name}"]) ** 2).sum()
    torch.autograd.backward(total)
    if plan.clip_norm is not None:
        nn.utils.clip_grad_norm_(trained.values(), plan.clip_norm)
    for name, p in trained.items() if plan.controls else ():
        assert p.grad is not None
        p.grad += state[f"correction.{name}"]
    optimiser.step()
    return loss.detach()


class _Graph:
    """A graph as a function of named tensors; tensors that it does not use are ignored."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, given: Mapping[str, Tensor]) -> Batch:
        outputs = [o.name for o in self._session.get_outputs()]
        feeds: dict[str, Any] = {i.name: given[i.name].detach().numpy() for i in self._session.get_inputs()}
        try:
            found = self._session.run(outputs, feeds)
        except Exception as exc:  # onnxruntime raises its own untyped errors
            raise TrainingDiffers(f"ONNX Runtime cannot run the training graph: {exc}") from exc
        return {name: torch.from_numpy(np.array(array)) for name, array in zip(outputs, found, strict=True)}


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite for NaN."""
    a, b = found.detach().to(torch.float64), wanted.detach().to(torch.float64)
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    off = float((a - b).abs().max()) / max(_SMALLEST, float(b.abs().max()))
    return off if off == off else float("inf")

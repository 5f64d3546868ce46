"""A training step as one function of tensors: forward, loss, backward, optimiser, new parameters out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtide.aggregation.training_export.noise import FedNoise
from fedtide.aggregation.training_export.optimisers import Named, clipped
from fedtide.aggregation.training_export.plan import TrainingPlan
from fedtide.aggregation.training_export.pooling import PooledByParts

Arguments = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Parts:
    """A module's tensors by role: trained, frozen or buffers."""

    trained: Named
    frozen: Named
    buffers: Named

    @classmethod
    def of(cls, plan: TrainingPlan) -> Parts:
        parameters = dict(plan.module.named_parameters())
        return cls(
            trained={k: p.detach().clone() for k, p in parameters.items() if p.requires_grad},
            frozen={k: p.detach().clone() for k, p in parameters.items() if not p.requires_grad},
            buffers={k: b.detach().clone() for k, b in plan.module.named_buffers() if k in plan.module.state_dict()},
        )


def model_arguments(parts: Parts) -> Arguments:
    groups = (("param", parts.trained), ("frozen", parts.frozen), ("buffer", parts.buffers))
    return {f"{kind}.{name}": t for kind, group in groups for name, t in group.items()}


def train_arguments(plan: TrainingPlan, parts: Parts, noise: Sequence[Tensor], batch: Arguments) -> Arguments:
    """All inputs of a first step, by their names in the graph."""
    slots = {f"slot.{s}.{k}": torch.zeros_like(p) for s in plan.optimiser.slots for k, p in parts.trained.items()}
    more: Arguments = {"rate": torch.tensor(0.01), "step": torch.tensor(1)}
    if plan.proximal:
        more |= {"mu": torch.tensor(0.1), **{f"anchor.{k}": p.clone() for k, p in parts.trained.items()}}
    if plan.controls:
        more |= {f"correction.{k}": torch.zeros_like(p) for k, p in parts.trained.items()}
    return {
        **model_arguments(parts),
        **slots,
        **{f"noise.{i}": n for i, n in enumerate(noise)},
        **batch,
        **more,
    }


def batch_arguments(plan: TrainingPlan) -> Arguments:
    return {**{f"input.{k}": v for k, v in plan.inputs.items()}, "target": plan.target}


def train(plan: TrainingPlan, given: Arguments) -> Arguments:
    """One step: `loss`, and each replaced tensor under `new.` and its name."""
    trained = {k: p.detach().requires_grad_() for k, p in group(given, "param.").items()}
    buffers = {k: b.clone() for k, b in group(given, "buffer.").items()}
    with FedNoise(list(group(given, "noise.").values())), plain_kernels(), PooledByParts():
        outputs = functional_call(plan.module, {**trained, **group(given, "frozen."), **buffers}, _inputs(given))
        loss = plan.loss(outputs, given["target"])
        found = torch.autograd.grad(_with_proximal(plan, loss, trained, given), list(trained.values()))
    grads = dict(zip(trained, found, strict=True))
    if plan.clip_norm is not None:
        grads = clipped(grads, plan.clip_norm)
    out: Arguments = {}
    for name, parameter in trained.items():
        grad = grads[name] + given[f"correction.{name}"] if plan.controls else grads[name]
        slots = {s: given[f"slot.{s}.{name}"] for s in plan.optimiser.slots}
        new = plan.optimiser.update(parameter.detach(), grad, slots, given["rate"], given["step"])
        out[f"new.param.{name}"] = new[0]
        out |= {f"new.slot.{s}.{name}": n for s, n in zip(slots, new[1:], strict=True)}
    return {
        **out,
        **{f"new.buffer.{k}": b for k, b in buffers.items()},
        "loss": loss.detach().to(torch.float32).reshape(()),
    }


def _with_proximal(plan: TrainingPlan, loss: Tensor, trained: Named, given: Arguments) -> Tensor:
    if not plan.proximal:
        return loss
    apart = torch.stack([((p - given[f"anchor.{k}"]) ** 2).sum() for k, p in trained.items()]).sum()
    return loss + given["mu"] / 2 * apart


def evaluate(plan: TrainingPlan, given: Arguments) -> Arguments:
    outputs = infer(plan, given)
    measures = {"loss": plan.loss, **plan.metrics}
    found = outputs["output.0"] if len(outputs) == 1 else tuple(outputs.values())
    return {name: measure(found, given["target"]).to(torch.float32) for name, measure in measures.items()}


def infer(plan: TrainingPlan, given: Arguments) -> Arguments:
    with plain_kernels(), torch.no_grad():
        tensors = {k: t for kind in ("param.", "frozen.", "buffer.") for k, t in group(given, kind).items()}
        outputs: Any = functional_call(plan.module, tensors, _inputs(given))
    several = outputs if isinstance(outputs, tuple | list) else [outputs]
    return {f"output.{i}": o for i, o in enumerate(several)}


def group(given: Mapping[str, Tensor], prefix: str) -> Named:
    """The tensors whose names start with `prefix`, by names without it."""
    return {name.removeprefix(prefix): t for name, t in given.items() if name.startswith(prefix)}


def _inputs(given: Arguments) -> tuple[Tensor, ...]:
    return tuple(group(given, "input.").values())


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Disable the fused kernels of attention and recurrent networks: they have no decomposition."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # torch types it as its descriptor
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled = onednn

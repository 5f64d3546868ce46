"""The same training in eager torch, and in the edge's runtime."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedtide.aggregation.training_export.noise import FedNoise
from fedtide.aggregation.training_export.plan import TrainingPlan
from fedtide.edge_agent.samples.source import Columns
from fedtide.edge_agent.training.onnx.graph import TrainingGraph
from fedtide.fabric.tensors.frame import Tensor
from fedtide.fabric.tensors.training_bundle import TrainingBundle

Arrays = dict[str, npt.NDArray[Any]]
RATE = 0.01
STEPS = 50


def columns(plan: TrainingPlan) -> Columns:
    return Columns({**{k: t.numpy() for k, t in plan.inputs.items()}, "label": plan.target.numpy()})


def state(plan: TrainingPlan) -> dict[str, Tensor]:
    return {k: Tensor.of(k, t.detach().numpy().copy()) for k, t in plan.module.state_dict().items()}


def batches(plan: TrainingPlan, bundle: TrainingBundle) -> list[Arrays]:
    generator = np.random.default_rng(0)
    found = []
    for number in range(STEPS):
        rows = generator.permutation(len(plan.target))[: 4 + number % 9]
        noise = {
            f"noise.{i}": generator.random(spec.shape_for(len(rows)), np.float32)
            for i, spec in enumerate(bundle.manifest.noise)
        }
        inputs = {f"input.{k}": t.numpy()[rows] for k, t in plan.inputs.items()}
        found.append({**inputs, "target": plan.target.numpy()[rows], **noise})
    return found


def in_runtime(plan: TrainingPlan, bundle: TrainingBundle, given: list[Arrays]) -> Arrays:
    manifest = bundle.manifest
    kinds = (("param", manifest.parameters), ("frozen", manifest.frozen), ("buffer", manifest.buffers))
    came = state(plan)
    values: Arrays = {f"{kind}.{s.name}": came[s.name].numpy() for kind, specs in kinds for s in specs}
    if manifest.proximal:
        values |= {f"anchor.{s.name}": came[s.name].numpy() for s in manifest.parameters}
        values["mu"] = np.array(0.1, np.float32)
    graph = TrainingGraph(bundle, {**values, "rate": np.array(RATE, np.float32)}, 1)
    for batch in given:
        graph.step(batch)
    return {k.partition(".")[2]: v for k, v in graph.values().items() if not k.startswith("slot.")}


def in_torch(plan: TrainingPlan, given: list[Arrays]) -> Arrays:
    module = copy.deepcopy(plan.module).train()
    trained = {k: p for k, p in module.named_parameters() if p.requires_grad}
    anchors = {k: p.detach().clone() for k, p in trained.items()}
    optimiser = plan.optimiser.eager(list(trained.values()), RATE)
    for batch in given:
        optimiser.zero_grad()
        with FedNoise([torch.from_numpy(v) for k, v in batch.items() if k.startswith("noise.")]):
            outputs = module(*(torch.from_numpy(v) for k, v in batch.items() if k.startswith("input.")))
            loss = plan.loss(outputs, torch.from_numpy(batch["target"]))
        if plan.proximal:
            loss = loss + 0.05 * sum(((p - anchors[k]) ** 2).sum() for k, p in trained.items())
        torch.autograd.backward(loss)
        if plan.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained.values(), plan.clip_norm)
        optimiser.step()
    return {k: t.numpy() for k, t in module.state_dict().items()}


def assert_close(found: Arrays, wanted: Arrays) -> None:
    for name, array in found.items():
        off = np.abs(array - wanted[name]).max() / max(1e-3, np.abs(wanted[name]).max())
        assert off <= 1e-5, (name, off)

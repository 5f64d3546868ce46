"""Trains a model for some epochs on a node's batches, and evaluates a model on them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtide.edge_agent.training.onnx.batches import Batches, slices
from fedtide.edge_agent.training.onnx.checkpoint import Checkpoint
from fedtide.edge_agent.training.onnx.graph import EvaluationGraph, TrainingGraph, replaced_specs
from fedtide.edge_agent.training.onnx.shuffle import TorchShuffle
from fedtide.fabric.tensors.training_bundle import BundleManifest, TrainingBundle

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TrainingParams:
    """How long and how a task trains."""

    epochs: int
    batch_size: int
    rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """`values` by the names of the graph's inputs; `loss` is the mean of the last epoch's steps."""

    values: dict[str, Array]
    loss: float
    steps: int


def learn(
    bundle: TrainingBundle,
    batches: Batches,
    values: Mapping[str, Array],
    params: TrainingParams,
    threads: int,
    progress: Path,
    checkpoint_s: float,
) -> TrainingResult:
    """Train from `values`, or from the checkpoint of this task in `progress`."""
    given = {**values, "rate": np.array(params.rate, np.float32)}
    found = Checkpoint.read(progress, batches.samples, replaced_specs(bundle.manifest))
    graph = TrainingGraph(bundle, given | dict(found.values if found is not None else {}), threads)
    if found is not None:
        log.info("training.resumed", extra={"steps": found.steps})
        graph.steps = found.steps
    losses = list(found.losses) if found is not None else []
    shuffle, saved, mean = TorchShuffle(params.seed), time.monotonic(), 0.0
    done, ends = graph.steps, 0
    for _ in range(params.epochs):
        chosen = list(slices(shuffle.permutation(batches.samples), params.batch_size, bundle.manifest.smallest_batch))
        begins, ends = ends, ends + len(chosen)
        if ends < done:
            continue
        if begins >= done:
            losses = []
        for indices in chosen[max(0, done - begins) :]:
            batch = batches.take(indices)
            if batch is None:
                continue
            noise = _noise(bundle.manifest, params.seed, graph.steps, len(batch["target"]))
            losses.append(graph.step({**batch, **noise}))
            if time.monotonic() - saved >= checkpoint_s:
                Checkpoint(graph.steps, batches.samples, tuple(losses), graph.values()).write(progress)
                saved = time.monotonic()
        mean = sum(losses) / max(1, len(losses))
    return TrainingResult(graph.values(), mean, graph.steps)


def _noise(manifest: BundleManifest, seed: int, step: int, rows: int) -> dict[str, Array]:
    """Uniform in [0, 1), by seed and step: a task that resumes drops out the same units."""
    if not manifest.noise:
        return {}
    generator = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, step]))
    return {f"noise.{i}": generator.random(spec.shape_for(rows), np.float32) for i, spec in enumerate(manifest.noise)}


def measure(
    bundle: TrainingBundle, batches: Batches, values: Mapping[str, Array], batch_size: int, threads: int
) -> dict[str, float]:
    """Loss and metrics over all samples."""
    graph = EvaluationGraph(bundle, values, threads)
    sums: dict[str, float] = {}
    rows = 0
    for indices in slices(np.arange(batches.samples), batch_size):
        batch = batches.take(indices)
        if batch is None:
            continue
        rows += len(batch["target"])  # fewer than asked for, if samples were deleted meanwhile
        for name, value in graph.measure(batch).items():
            sums[name] = sums.get(name, 0.0) + value * len(batch["target"])
    return {name: total / rows for name, total in sums.items() if rows}

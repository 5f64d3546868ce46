"""Training on a node: ONNX Runtime and a training bundle against torch and the app's own code.

Both examples, the same task, one node's data, one thread, both trainers as an agent starts them, in turn. A step's
time is the difference between tasks of more and of fewer epochs in a process that is warm.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

from benchmarks.report import Row, load_now, write
from fedtide.console.app_bundles import training_bundle
from fedtide.edge_agent.training.onnx.task import model_values
from fedtide.fabric.flower.apps import bundle as pack_app
from fedtide.fabric.flower.apps import describe, unpack
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors import training_bundle as bundles
from fedtide.fabric.tensors.frame import Tensor
from fedtide.fabric.tensors.training_bundle import TRAINING
from tests.training import jobs
from tests.training.jobs import TrainerProcess

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODES = {"onnx": "fedtide.edge_agent.training.onnx", "torch": "fedtide.edge_agent.training.flower"}
NODE: ConfigValues = {"partition-id": 0, "num-partitions": 4}
FEW, MANY = 1, 6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeat", type=int, default=5)
    repeat = options.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        apps = {name: _app(name, Path(folder)) for name in ("digits", "sensors")}
        load = load_now()
        rows = [row for name, app in apps.items() for row in _measured(name, app, Path(folder), repeat)]
    sizes = {mode: _installed(extra) for mode, extra in (("onnx", ("edge",)), ("torch", ("edge", "train", "torch")))}
    rows.append(Row("agent", "installed", "MB", sizes["onnx"], sizes["torch"], "with flwr and torch"))
    write("edge_training", load, rows)


def _app(name: str, folder: Path) -> Path:
    made = training_bundle(EXAMPLES / name, {})
    app = folder / name
    unpack(pack_app(EXAMPLES / name, {TRAINING: made.read_bytes()}), app)
    return app


def _measured(name: str, app: Path, folder: Path, repeat: int) -> list[Row]:
    found: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
    for number in range(repeat):
        for mode, module in MODES.items():
            measured = _one(app, module, folder / f"{name}-{mode}-{number}")
            for key, value in measured.items():
                found[mode].setdefault(key, []).append(value)
    units = {"step": "ms", "peak resident": "MB", "start to first answer": "s"}
    middle = {mode: {key: statistics.median(values) for key, values in kept.items()} for mode, kept in found.items()}
    note = f"median of {repeat}"
    return [
        Row(name, key, unit, middle["onnx"][key], middle["torch"][key], "torch", note) for key, unit in units.items()
    ]


def _one(app: Path, module: str, folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    trainer = TrainerProcess(module)
    try:
        steps = [_train(trainer, app, folder / "first", 1)[0]]
        started = time.perf_counter() - began
        taken = {}
        for epochs in (FEW, MANY):
            count, seconds = _train(trainer, app, folder / str(epochs), epochs)
            taken[count] = seconds
        fewer, more = sorted(taken)
        status = Path(f"/proc/{trainer.process.pid}/status").read_text()
        peak = int(next(iter(re.findall(r"VmHWM:\s+(\d+) kB", status)))) / 1000
        assert steps[0] == fewer
        return {
            "step": 1000 * (taken[more] - taken[fewer]) / (more - fewer),
            "peak resident": peak,
            "start to first answer": started,
        }
    finally:
        trainer.kill()


def _train(trainer: TrainerProcess, app: Path, folder: Path, epochs: int) -> tuple[int, float]:
    """(steps, seconds) of one task."""
    config = {**describe(app).config, "local-epochs": epochs}
    task = jobs.task(jobs.message("train", _initial(app), {"server-round": 1}), config)
    job = jobs.job(folder, app, task, NODE, checkpoint_s=20.0)
    began = time.perf_counter()
    answer = trainer.do(job)
    seconds = time.perf_counter() - began
    assert answer.content is not None, answer.error
    metrics = answer.content["metrics"]
    samples = metrics.values["num-examples"]
    assert isinstance(samples, int)
    batch = int(config["batch-size"])
    return epochs * -(-samples // batch), seconds


def _initial(app: Path) -> dict[str, Tensor]:
    """Any model of the right form: its values do not change how long a step takes."""
    made = bundles.read((app / TRAINING).read_bytes())
    generator = np.random.default_rng(0)
    specs = made.manifest.parameters
    tensors = {s.name: Tensor.of(s.name, generator.normal(0, 0.05, s.shape).astype(np.float32)) for s in specs}
    assert model_values(made, tensors)
    return tensors


def _installed(extras: tuple[str, ...]) -> float:
    """Megabytes of our own package and everything that these extras need, as files of this environment."""
    return sum(_size(name) for name in _closure("fedtide", extras)) / 1e6


def _closure(root: str, extras: tuple[str, ...]) -> set[str]:
    def needed(name: str, chosen: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
        for text in distribution(name).requires or []:
            wanted = Requirement(text)
            environments = [{"extra": extra} for extra in chosen] or [{"extra": ""}]
            if wanted.marker is None or any(wanted.marker.evaluate(e) for e in environments):
                yield wanted.name.lower(), tuple(wanted.extras)

    seen: set[str] = set()
    waiting = [(root, extras)]
    while waiting:
        name, chosen = waiting.pop()
        if name in seen and not chosen:
            continue
        try:
            waiting += [(n, e) for n, e in needed(name, chosen) if n not in seen]
        except PackageNotFoundError:
            continue
        seen.add(name)
    return seen - {"fedtide"}


def _size(name: str) -> int:
    files = distribution(name).files or []
    paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.exists())


if __name__ == "__main__":
    main()

"""Histograms with fixed bins of a model's features, predictions and confidence. Pure numpy, constant memory.

The bins are the same everywhere, so sketches of nodes are summed by adding. Features are binned by
their inverse hyperbolic sine: even steps around zero, logarithmic far out, no range to know before.
An input with more than `MAX_FEATURES` numbers is described by its mean, spread, least and greatest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fedtide.edge_agent.serving.scoring import Array, predictions
from fedtide.fabric.errors import MalformedMessage, RemoteError
from fedtide.fabric.plans.release import Scoring
from fedtide.fabric.tensors.frame import Tensor, decode, encode

Histogram = npt.NDArray[np.int64]

BINS = 64
STEPS = 4
"""Bins per unit of arsinh: one bin is a quarter of a standard deviation for a standardised feature."""
MAX_FEATURES = 32
CONFIDENCE_BINS = 20
PREDICTION = "prediction"
CONFIDENCE = "confidence"


class Sketch:
    """Histograms by name. `samples` counts rows."""

    def __init__(self, histograms: dict[str, Histogram] | None = None, samples: int = 0) -> None:
        self.histograms = histograms or {}
        self.samples = samples

    def add(self, inputs: dict[str, Array], outputs: dict[str, Array], scoring: Scoring) -> None:
        """Count one request's rows, or several requests' joined."""
        rows = 0
        with np.errstate(all="ignore"):  # whatever a client sends is counted, at the far ends if need be
            for name, array in inputs.items():
                if array.dtype.kind in "biuf" and array.size:
                    rows = array.shape[0] if array.ndim else 1
                    self._features(name, array.reshape(rows, -1).astype(np.float64))
            self._outputs(outputs, scoring)
        self.samples += rows

    def _features(self, name: str, rows: npt.NDArray[np.float64]) -> None:
        columns = (
            {f"{name}[{i}]": rows[:, i] for i in range(rows.shape[1])}
            if rows.shape[1] <= MAX_FEATURES
            else {
                f"{name}.mean": rows.mean(axis=1),
                f"{name}.std": rows.std(axis=1),
                f"{name}.min": rows.min(axis=1),
                f"{name}.max": rows.max(axis=1),
            }
        )
        for column, values in columns.items():
            finite = np.nan_to_num(np.arcsinh(values) * STEPS, nan=BINS, posinf=BINS, neginf=-BINS)
            bins = np.clip(np.floor(finite) + BINS // 2, 0, BINS - 1).astype(np.int64)
            self._count(column, bins, BINS)

    def _outputs(self, outputs: dict[str, Array], scoring: Scoring) -> None:
        try:
            said = predictions(scoring, outputs)
        except RemoteError:
            return
        if said.dtype.kind in "iu":
            self._count(PREDICTION, np.clip(said, 0, BINS - 1).astype(np.int64), BINS)
            array = outputs[scoring.output or next(iter(outputs))]
            sure = _confidence(array.reshape(array.shape[0], -1).astype(np.float64))
            bins = np.clip(np.floor(sure * CONFIDENCE_BINS), 0, CONFIDENCE_BINS - 1)
            self._count(CONFIDENCE, bins.astype(np.int64), CONFIDENCE_BINS)
        else:
            bins = np.clip(np.floor(np.arcsinh(np.nan_to_num(said)) * STEPS) + BINS // 2, 0, BINS - 1)
            self._count(PREDICTION, bins.astype(np.int64), BINS)

    def _count(self, name: str, bins: npt.NDArray[np.int64], size: int) -> None:
        counted = np.bincount(bins, minlength=size)
        known = self.histograms.get(name)
        self.histograms[name] = counted if known is None else known + counted


def _confidence(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The greatest probability of each row; rows that are no probabilities are taken as logits."""
    if (rows < 0).any() or not np.allclose(rows.sum(axis=1), 1.0, atol=1e-3):
        rows = np.exp(rows - rows.max(axis=1, keepdims=True))
        rows = rows / rows.sum(axis=1, keepdims=True)
    return np.asarray(np.nan_to_num(rows.max(axis=1)))


def total(sketches: Iterable[Sketch]) -> Sketch:
    """The sum; histograms that some node lacks are left out, so that they identify no node."""
    known = list(sketches)
    names = set.intersection(*({(n, h.size) for n, h in s.histograms.items()} for s in known)) if known else set()
    summed = {n: np.sum([s.histograms[n] for s in known], axis=0) for n, _ in sorted(names)}
    return Sketch(summed, sum(s.samples for s in known))


def psi(now: Histogram, before: Histogram) -> float:
    """Population stability index of two histograms, minus its expected value when nothing changed.

    By chance it is about (k - 1) (1/n + 1/m) for k bins in use (Yurdakul, "Statistical properties of the
    population stability index", 2018).
    """
    n, m = int(now.sum()), int(before.sum())
    used = (now > 0) | (before > 0)
    k = int(used.sum())
    if not n or not m or k < 2:
        return 0.0
    p = (now[used] + 0.5) / (n + 0.5 * k)
    q = (before[used] + 0.5) / (m + 0.5 * k)
    found = float(((p - q) * np.log(p / q)).sum())
    return max(0.0, found - (k - 1) * (1 / n + 1 / m)) if math.isfinite(found) else 0.0


def scores(now: Sketch, before: Sketch) -> dict[str, float]:
    """The index of every histogram that both have."""
    both = {n: (h, before.histograms[n]) for n, h in now.histograms.items() if n in before.histograms}
    return {n: psi(*pair) for n, pair in both.items() if pair[0].size == pair[1].size}


def pack(release: str, sketch: Sketch, window_s: float) -> bytes:
    """A sketch on its way to the region's collector; `release` is a digest."""
    about = np.frombuffer(json.dumps([release, sketch.samples, window_s]).encode(), np.uint8)
    tensors = [Tensor.of("about", about), *(Tensor.of(f"h.{n}", h) for n, h in sketch.histograms.items())]
    return b"".join(encode(tensors))


def unpack(raw: bytes) -> tuple[str, Sketch, float]:
    """The inverse of `pack`; raises MalformedMessage."""
    tensors = {t.name: t.numpy() for t in decode(raw)}
    try:
        digest, samples, window_s = json.loads(tensors.pop("about").tobytes())
        histograms = {n.removeprefix("h."): h.astype(np.int64) for n, h in tensors.items()}
        return str(digest), Sketch(histograms, int(samples)), float(window_s)
    except (KeyError, ValueError, TypeError) as exc:
        raise MalformedMessage("that is no sketch") from exc

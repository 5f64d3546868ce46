"""The demo's picture: accuracy by round, federated against centralised."""

from __future__ import annotations

from pathlib import Path

from fedtide.console.demo.report import DemoReport
from fedtide.fabric.process.files import keep_caches_in


def draw(report: DemoReport, file: Path) -> None:
    """Write a PNG."""
    keep_caches_in(file.parent)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    rounds = [0, *[r.round for r in report.rounds]]
    accuracy = [report.accuracy.initial, *[r.accuracy for r in report.rounds]]
    axes.plot(rounds, accuracy, marker="o", label=f"federated, {report.nodes} nodes in {len(report.regions)} regions")
    axes.axhline(report.accuracy.centralised, linestyle="--", color="gray", label="centralised, pooled data")
    axes.set(xlabel="round", ylabel="accuracy on held-out digits", ylim=(0, 1), xticks=rounds)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)

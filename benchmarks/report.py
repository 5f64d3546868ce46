"""What every benchmark prints and writes: rows of ours against a peer, measured in turn in one run."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

MAX_LOAD = 2.0


@dataclass(frozen=True)
class Row:
    case: str
    metric: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    note: str = ""
    ratio: float | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.ours / self.peer if self.peer else None)


def load_now(*, refuse_busy: bool = True) -> float:
    """The machine's load average; a benchmark on a busy machine would say nothing."""
    load = os.getloadavg()[0]
    if refuse_busy and load > MAX_LOAD:
        sys.exit(f"load is {load:.1f}, more than {MAX_LOAD:.0f}: wait until the machine is quiet")
    return load


def write(name: str, load_before: float, rows: list[Row]) -> None:
    """Print a table and write `.fedtide/bench/NAME.json`."""
    file = Path(".fedtide", "bench", f"{name}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"name": name, "when": when, "load_before": load_before, "rows": [asdict(r) for r in rows]}
    file.write_text(json.dumps(content, indent=2))
    table = Table("case", "metric", "unit", "ours", "peer", "ratio", "peer name", "note", box=SIMPLE_HEAD)
    for r in rows:
        table.add_row(r.case, r.metric, r.unit, _cell(r.ours), _cell(r.peer), _cell(r.ratio), r.peer_name, r.note)
    Console(width=140).print(table)
    print(f"load before: {load_before:.2f}; written to {file}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

"""`python -m fedtide.coordinator.tracking`: reports runs as it is told, one `RunRecord` a line of standard input.

Answers each with a line: {"error": TEXT}, which is empty if all went well.
"""

from __future__ import annotations

import json
import os
import sys

from fedtide.coordinator.tracking.record import RunRecord
from fedtide.fabric import logs


def main() -> int:
    logs.to_stderr()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        answers.write(json.dumps({"error": _report(RunRecord.model_validate_json(line))}) + "\n")
    return 0


def _report(record: RunRecord) -> str:
    """What went wrong with any of the trackers, or nothing."""
    wrong = []
    if record.event_files is not None:
        try:
            from fedtide.coordinator.tracking import event_files

            event_files.report(record, record.event_files)
        except (OSError, ImportError, ValueError) as exc:
            wrong.append(f"event files: {exc}")
    if record.mlflow:
        try:
            from fedtide.coordinator.tracking import mlflow_runs

            mlflow_runs.report(record)
        except Exception as exc:  # of the library's or of its transport
            wrong.append(f"mlflow: {type(exc).__name__}: {exc}")
    return "; ".join(wrong)[:1000]


if __name__ == "__main__":
    sys.exit(main())

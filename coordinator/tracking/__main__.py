"""`python -m fedtide.coordinator.tracking`: reports runs as it is told, one `RunRecord` a line of standard input.

Answers each with a line: {"error": TEXT, "wants": whether it is to be told again, with the artefacts}. The error is
empty if all went well; of what a server has said it holds the status only, not the text.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from fedtide.coordinator.tracking.record import RunRecord
from fedtide.fabric import logs


def main() -> int:
    logs.to_stderr()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        wrong, wants = _report(RunRecord.model_validate_json(line))
        answers.write(json.dumps({"error": wrong, "wants": wants}) + "\n")
    return 0


def _report(record: RunRecord) -> tuple[str, bool]:
    """What went wrong, or nothing; and whether the artefacts are wanted."""
    try:
        if record.event_files is not None:
            from fedtide.coordinator.tracking import event_files

            return "", event_files.report(record, record.event_files)
        from fedtide.coordinator.tracking import mlflow_runs

        return "", mlflow_runs.report(record)
    except (OSError, ImportError) as exc:
        said = exc.strerror if isinstance(exc, OSError) else exc.msg
        return f"{type(exc).__name__}: {said or 'see tracking.log'}", False
    except Exception as exc:  # of the library's or of its transport
        logging.getLogger(__name__).exception("tracking.failed")
        status = getattr(exc, "get_http_status_code", lambda: "")()
        return f"{type(exc).__name__} {status}".strip(), False


if __name__ == "__main__":
    sys.exit(main())

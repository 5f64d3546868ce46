"""`python -m ...training_export APP [RUN_CONFIG]`: prints where the app's training bundle is, as JSON."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from fedtide.aggregation.training_export.cache import cached, planned
from fedtide.fabric import logs
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.flower.app_objects import load_object
from fedtide.fabric.flower.apps import describe, fuse


def main(arguments: list[str]) -> int:
    logs.to_stderr()
    with redirect_stdout(sys.stderr):  # apps print
        answer = _made(arguments)
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _made(arguments: list[str]) -> dict[str, object]:
    """Where the bundle is, or why there is none."""
    directory = Path(arguments[0]).resolve()
    try:
        app = describe(directory)
        config = fuse(app.config, json.loads(arguments[1]) if len(arguments) > 1 else {})
        if app.training is None:
            raise ConfigError(
                f"{directory / 'pyproject.toml'}: tool.fedtide.app",
                "has no `training`",
                "Name the function that returns the app's TrainingPlan (docs/training-without-torch.md)",
            )
        reference = app.training

        def export() -> bytes:
            from fedtide.aggregation.training_export import exporter, plan

            hooked, fixed = planned(load_object(reference, directory), reference, config)
            if not isinstance(hooked, plan.TrainingPlan):
                raise ConfigError(f"training hook {reference}", "must return a TrainingPlan")
            return exporter.export(hooked, fixed)

        return {"file": str(cached(directory, config, export))}
    except FedtideError as exc:
        return {"what": exc.what, "remedy": exc.remedy, "exit_code": exc.exit_code}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

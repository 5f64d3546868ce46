"""`python -m aggregation.training_export APP [RUN_CONFIG_JSON]`: prints the file of the app's training bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aggregation.training_export.cache import cached, planned
from fabric import logs
from fabric.app_objects import load_object
from fabric.apps import describe, fuse
from fabric.errors import ConfigError, FedtideError


def main(arguments: list[str]) -> int:
    logs.to_stderr()
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
            from aggregation.training_export import exporter, plan

            told, fixed = planned(load_object(reference, directory), reference, config)
            if not isinstance(told, plan.TrainingPlan):
                raise ConfigError(f"training hook {reference}", "must return a TrainingPlan")
            return exporter.export(told, fixed)

        sys.stdout.write(f"{cached(directory, config, export)}\n")
    except FedtideError as exc:
        sys.stderr.write(f"{exc}\n")
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m fedtide.coordinator CONFIG.json [--check]`: what `fedtide coordinator` and the embedded mode start."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from fedtide.coordinator.adapters import traces
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.service import serve
from fedtide.fabric import logs
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.process.files import keep_caches_in
from fedtide.fabric.process.until_signalled import until_signalled
from fedtide.fabric.validation import config_error

log = logging.getLogger(__name__)


def load(file: Path) -> CoordinatorConfig:
    """Raises ConfigError naming the field that is wrong."""
    try:
        values = json.loads(file.read_bytes())
        return CoordinatorConfig.model_validate({**values, **_from_environment(os.environ)})
    except OSError as exc:
        raise ConfigError(str(file), f"cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        if not isinstance(exc, ValidationError):
            raise ConfigError(str(file), f"is not JSON: {exc}") from exc
        raise config_error(exc, CoordinatorConfig, str(file)) from exc


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What differs between replicas that share a file."""
    named = {"name": "FEDTIDE_COORDINATOR_NAME", "advertise_url": "FEDTIDE_ADVERTISE_URL"}
    named |= {"advertise_host": "FEDTIDE_ADVERTISE_HOST"}
    return {field: environ[variable] for field, variable in named.items() if environ.get(variable)}


async def _until_signalled(config: CoordinatorConfig) -> None:
    try:
        await until_signalled(serve(config))
        log.info("coordinator.stopped")
    except BaseExceptionGroup as group:
        ours, others = group.split(FedtideError)
        if others is not None or ours is None:
            raise
        first: BaseException = ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def main() -> int:
    """Serve until a signal; returns the exit code."""
    logs.to_stderr()
    try:
        match sys.argv[1:]:
            case [file, *rest] if rest in ([], ["--check"]):
                config = load(Path(file))
            case _:
                raise ConfigError("usage", "python -m fedtide.coordinator CONFIG.json [--check]")
        traces.check(config.traces)
        if rest:
            return 0
        keep_caches_in(config.data_dir)
        asyncio.run(_until_signalled(config))
    except FedtideError as exc:
        print(f"fedtide coordinator: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

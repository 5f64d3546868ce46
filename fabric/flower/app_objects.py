"""Objects of an app, imported from its own directory; no flwr needed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from fedtide.fabric.errors import FedtideError
from fedtide.fabric.flower.app_errors import told


class AppLoadError(FedtideError):
    """An app whose component cannot be imported."""

    exit_code = 2


def load_object(reference: str, directory: Path) -> Any:
    """What an app names as `module:attribute`.

    Raises:
        AppLoadError: a module or attribute is missing, or raises at import.
    """
    module, _, attribute = reference.partition(":")
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as exc:
        raise AppLoadError(
            f"{reference} needs the Python module {exc.name!r}, which is not installed here",
            "Install it on the machines that run this app; what a training bundle names must not need torch or flwr",
        ) from exc
    except Exception as exc:  # an app may raise anything while it is imported
        raise AppLoadError(f"importing {reference} raised {told(exc, directory)}") from exc

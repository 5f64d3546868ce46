"""Where a run's metrics and results are reported beside the coordinator's own views. Pure data."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from fedtide.fabric.strict import Strict


def _checked(uri: str) -> str:
    if uri and (urlsplit(uri).scheme not in ("http", "https") or not urlsplit(uri).hostname):
        raise ValueError("must be the http:// or https:// URL of an MLflow server")
    return uri


class Tracking(Strict):
    """`[tool.fedtide.track]` of an app, or `--track`."""

    mlflow: Annotated[str, AfterValidator(_checked)] = Field(default="", description="URL of an MLflow server")
    tensorboard: bool = Field(default=False, description="Write event files, where the coordinator keeps them")
    experiment: str = Field(default="", max_length=250, description="Name in both; empty: the app's")

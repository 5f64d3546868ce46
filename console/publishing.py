"""The publisher's key: with it an app is signed before it is sent, here, where its source is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedtide.console.home import Home
from fedtide.console.servers import SERVER
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.trust import keys
from fedtide.fabric.trust.claims import signed_app
from fedtide.fabric.trust.installation import PUBLISHER_KEY

SIGNING_KEY = "FEDTIDE_SIGNING_KEY"
"""Environment variable: file of the publisher's private key (PEM), or `hsm:...` for a token (PKCS #11)."""


def signing_key(environment: Mapping[str, str] | None = None) -> str:
    """Whose key signs apps: that of the variable, or of the installation in the present home; empty: there is none."""
    env = os.environ if environment is None else environment
    if env.get(SIGNING_KEY):
        return env[SIGNING_KEY]
    file = key_of(Home.of_caller())
    return str(file) if file.exists() and not env.get(SERVER) else ""


def key_of(home: Home) -> Path:
    """The publisher's key that `fedtide up` makes."""
    return home.trust / PUBLISHER_KEY


def signed(app: AppRef, key: str = "") -> AppRef:
    """An app with the signature of a publisher's key; unchanged, where there is none.

    Raises:
        ConfigError: the key cannot be read.
    """
    name = key or signing_key()
    if not name:
        return app
    try:
        return signed_app(app, [keys.load(name)])
    except ConfigError as exc:
        raise ConfigError(SIGNING_KEY, exc.problem, exc.remedy) from exc

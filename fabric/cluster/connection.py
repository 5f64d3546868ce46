"""Finding the API server: that of the cluster this process runs in, or of a kubeconfig."""

from __future__ import annotations

import os

from kubernetes import client, config

from fedtide.fabric.errors import ConfigError


def api_client(context: str | None = None) -> client.ApiClient:
    """A client of the cluster that this process runs in, else of the kubeconfig's (current) context.

    Raises:
        ConfigError: there is neither.
    """
    settings = client.Configuration()
    settings.retries = False  # our callers know how long they want to wait
    try:
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            # Named here: the library looks at the variable once, when it is imported.
            config.load_kube_config(os.environ.get("KUBECONFIG"), context, client_configuration=settings)
    except config.ConfigException as exc:
        raise ConfigError("kubernetes", str(exc), "Set KUBECONFIG, or run in a cluster") from exc
    return client.ApiClient(settings)

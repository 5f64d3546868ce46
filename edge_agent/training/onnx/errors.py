"""Why a task from a bundle is refused; each has its own remedy."""

from __future__ import annotations

from fedtide.fabric.errors import FedtideError


class GraphMismatch(FedtideError):
    """A graph's inputs or outputs are not those of its manifest."""


class WrongData(FedtideError):
    """The node's data source gives other columns, types or shapes than the bundle was made for."""


class WrongModel(FedtideError):
    """A message's arrays are not the parameters of the bundle."""


class WrongTask(FedtideError):
    """A message that a bundle cannot answer, or a run config that it was not made for."""

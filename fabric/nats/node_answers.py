"""What a node answers when it is asked over the broker: a message, or why it refuses."""

from __future__ import annotations

from collections.abc import Awaitable

from pydantic import BaseModel

from fedtide.fabric.encoding import to_json
from fedtide.fabric.errors import FedtideError
from fedtide.fabric.messages.views import Problem

STATUS = "Status"
"""Header of a refusal, whose body is a problem."""


async def answered(work: Awaitable[BaseModel]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer that `work` gives."""
    try:
        return to_json(await work), {}
    except FedtideError as exc:
        refused = Problem(title="Refused", status=400, detail=exc.what, remedy=exc.remedy, exit_code=exc.exit_code)
        return to_json(refused), {STATUS: "400"}

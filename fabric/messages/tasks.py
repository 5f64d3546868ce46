"""Messages between aggregator and node: Flower's message without its tensors.

Array records travel as tensor frames, inline when small and as blobs otherwise; metric and
config records travel as values. No flwr here: a node without Flower reads and writes the same.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from typing import Annotated, Literal

from pydantic import Field

from fedtide.fabric.messages.usage import Usage
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.strict import ConfigValues, Message, Strict, Tagged, TaggedMessage
from fedtide.fabric.tensors.blobs import BlobRef

INLINE_BYTES = 16 * 1024
"""Frames up to this size travel inside the message."""


class Packed(Strict):
    """Bytes inside a values record: JSON has no type for bytes."""

    base64: str

    @classmethod
    def of(cls, data: bytes) -> Packed:
        return cls(base64=base64.b64encode(data).decode())

    def unpack(self) -> bytes:
        return base64.b64decode(self.base64)


WireValue = bool | int | float | str | Packed | list[bool | int | float | str | Packed]


class Arrays(Tagged):
    """An array record: exactly one of `inline` (a frame) and `blob` is set.

    `coded`: its tensors are differences (see tensors.codecs), on the way down to the frame `base`, on the way up to
    what the node was given. `base` without `coded`: keep this frame, later messages will be differences to it.
    """

    kind: Literal["arrays"] = "arrays"
    inline: bytes | None = None
    blob: BlobRef | None = None
    coded: bool = False
    base: BlobRef | None = None


class Values(Strict):
    """A metric or config record; the order of keys is kept."""

    kind: Literal["metrics", "config"]
    values: dict[str, WireValue]


class WireError(Strict):
    """Why a node has no answer; codes are Flower's `ErrorCode`."""

    code: int
    reason: str = ""


class WireMessage(Strict):
    """One Flower message; exactly one of `content` and `error` is set."""

    run_id: int
    message_id: str
    src_node_id: int
    dst_node_id: int
    reply_to_message_id: str = ""
    group_id: str = ""
    created_at: float
    ttl: float
    message_type: str
    content: dict[str, Annotated[Arrays | Values, Field(discriminator="kind")]] | None = None
    error: WireError | None = None

    def reply(
        self,
        now: float,
        *,
        content: dict[str, Annotated[Arrays | Values, Field(discriminator="kind")]] | None = None,
        error: WireError | None = None,
    ) -> WireMessage:
        """The answer to this message, as flwr would make it; `now` in Unix seconds."""
        return WireMessage(
            run_id=self.run_id,
            message_id="",
            src_node_id=self.dst_node_id,
            dst_node_id=self.src_node_id,
            reply_to_message_id=self.message_id,
            group_id=self.group_id,
            created_at=now,
            ttl=max(1.0, self.created_at + self.ttl - now),
            message_type=self.message_type,
            content=content,
            error=error,
        )

    def blobs(self) -> list[BlobRef]:
        """The blobs that must be fetched before the message can be read."""
        return list(dict.fromkeys([*self.carried(), *self.bases()]))

    def carried(self) -> list[BlobRef]:
        """Those of them that hold its records."""
        return [r.blob for r in self._arrays() if r.blob is not None]

    def bases(self) -> list[BlobRef]:
        """Those of them that its records, or those of later messages, are coded against."""
        return [r.base for r in self._arrays() if r.base is not None]

    def _arrays(self) -> list[Arrays]:
        return [r for r in (self.content or {}).values() if isinstance(r, Arrays)]


class Task(TaggedMessage):
    """Work for one node: give `message` to the app's ClientApp, and send what it returns."""

    kind: Literal["task"] = "task"
    task: str
    run: str
    app: AppRef
    run_config: ConfigValues
    message: WireMessage
    expires_at: float = Field(description="Unix seconds after which no answer is wanted")
    codec: str = Field(
        default="", description="How the update should be coded (fedtide.fabric.tensors.codecs); empty: not"
    )
    stay: bool = Field(default=False, description="Leave the update's tensors in the region, which sums them")


def bytes_of(tasks: Sequence[Task], there: Collection[BlobRef] = ()) -> tuple[int, int]:
    """The bytes of these tasks for all their nodes, and those that cross the link to one region: each blob once, and
    none that is `there` already.
    """
    words = sum(len(task.model_dump_json()) for task in tasks)
    carried = [ref for task in tasks for ref in task.message.carried()]
    new = set(carried).difference(there)
    return words + sum(ref.size_bytes for ref in carried), words + sum(ref.size_bytes for ref in new)


class Cancel(TaggedMessage):
    """Replaces a task that is no longer wanted."""

    kind: Literal["cancel"] = "cancel"
    task: str
    run: str


Order = Annotated[Task | Cancel, Field(discriminator="kind")]


class Reply(Message):
    """A node's answer to one task."""

    task: str
    run: str
    node: str
    seconds: float = Field(ge=0, description="From start of the task to its answer, on the node's clock")
    stays: bool = Field(default=False, description="Its blobs are in its region's stream STAY, not in UP")
    usage: Usage = Field(default=Usage(), description="Of the trainer for this task")
    message: WireMessage

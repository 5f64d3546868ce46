"""What of a run's checkpoint others than its aggregator read: its models. Pure data."""

from __future__ import annotations

from fedtide.fabric.messages.tasks import Arrays
from fedtide.fabric.strict import Message
from fedtide.fabric.tensors.blobs import BlobRef


class ModelAfter(Message):
    """The model after a round."""

    round: int
    arrays: Arrays


class CheckpointedModels(ModelAfter):
    """The last model of a run, and the best one by its stop rule."""

    best: ModelAfter | None = None


class Elsewhere(Message):
    """In the place of a record that is too large for a message."""

    elsewhere: BlobRef

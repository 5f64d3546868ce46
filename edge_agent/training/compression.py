"""Compression of updates as a Flower mod: a ClientApp's arrays leave the node coded.

The trainer puts it around every app whose task asks for a codec. With Flower's own engine an app takes it
itself, `ClientApp(mods=[CompressionMod("int8")])`, and a strategy of ours on the server reads it.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message

from fedtide.edge_agent.training.update_coding import RESIDUAL, code
from fedtide.fabric.flower import bridge as flower
from fedtide.fabric.ids import flower_int
from fedtide.fabric.tensors.codecs import Codec


class CompressionMod:
    """Codes the difference between the only array record received and the only one returned.

    With topk, the residual is kept in the context's state and added to the next update.
    """

    def __init__(self, codec: str) -> None:
        self._codec = Codec.parse(codec)

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        came = list(message.content.array_records.values())
        base = {t.name: t for t in flower.tensors_of(came[0])} if len(came) == 1 else {}
        reply = call_next(message, context)
        if not base or not reply.has_content() or len(reply.content.array_records) != 1:
            return reply
        ((name, record),) = reply.content.array_records.items()
        update = flower.tensors_of(record)
        seed = flower_int(f"{context.node_id}.{message.metadata.message_id}")
        kept = {k: a.numpy() for k, a in context.state.array_records.get(RESIDUAL, ArrayRecord()).items()}
        coded, left = code(self._codec, update, base, kept, seed)
        if left is not None:
            context.state[RESIDUAL] = ArrayRecord({t.name: flower.array_of(t) for t in left})
        reply.content[name] = ArrayRecord({t.name: flower.array_of(t) for t in coded})
        return reply

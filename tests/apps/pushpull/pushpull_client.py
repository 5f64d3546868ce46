"""Answers queries, through a mod, with values of every kind that a record may hold."""

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


def signing_mod(message: Message, context: Context, call_next) -> Message:
    reply = call_next(message, context)
    reply.content["signature"] = ConfigRecord({"by": "mod", "raw": b"\x00\xff"})
    return reply


app = ClientApp(mods=[signing_mod])


@app.query("ask", mods=[signing_mod])
def ask(message: Message, context: Context) -> Message:
    content = RecordDict(
        {
            "echo": message.content["question"],
            "numbers": MetricRecord({"one": 1, "half": 0.5, "many": [1, 2, 3], "nan": float("nan")}),
            "run": ConfigRecord({"greeting": str(context.run_config["greeting"])}),
        }
    )
    return Message(content, reply_to=message)

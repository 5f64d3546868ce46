"""A custom main that pushes and pulls messages itself; leaves what it got in answers.json."""

import json
import math
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    nodes = list(grid.get_node_ids())
    question = ConfigRecord({"text": "how are you", "blob": b"\x01" * 40_000, "list": ["a", "b"], "flag": True})
    messages = [Message(RecordDict({"question": question}), n, "query.ask") for n in nodes]
    waiting = set(grid.push_messages(messages))
    replies = []
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
        time.sleep(0.05)
    answers = []
    for reply in replies:
        echo, numbers = reply.content["echo"], reply.content["numbers"]
        answers.append(
            {
                "same": dict(echo) == dict(question),
                "many": list(numbers["many"]),
                "nan": math.isnan(numbers["nan"]),
                "kinds": [type(numbers["one"]).__name__, type(numbers["half"]).__name__, type(echo["flag"]).__name__],
                "greeting": reply.content["run"]["greeting"],
                "raw": list(reply.content["signature"]["raw"]),
            }
        )
    with open("answers.json", "w") as file:
        json.dump(answers, file)

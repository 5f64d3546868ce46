"""Rounds of `kilobytes` to `nodes` nodes and back; writes the seconds of each to `report`."""

import json
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < int(config["nodes"]):
        time.sleep(0.1)
    seconds = []
    for number in range(int(config["rounds"])):
        values = np.random.default_rng(number).random(int(config["kilobytes"]) * 250, dtype=np.float32)
        record = RecordDict({"arrays": ArrayRecord({"w": Array(values)})})
        began = time.monotonic()
        messages = [Message(record, n, "train", group_id=str(number + 1)) for n in nodes]
        replies = list(grid.send_and_receive(messages, timeout=600))
        assert len(replies) == len(nodes) and all(r.has_content() for r in replies)
        assert all(r.content["arrays"]["w"].numpy()[-1] != values[-1] for r in replies)
        seconds.append(time.monotonic() - began)
    with open(str(config["report"]), "w") as file:
        json.dump(seconds, file)

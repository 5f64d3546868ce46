"""What a node does: train on its own people's recordings, or evaluate the global model on them."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from sensors import data, model

app = ClientApp()


def _own(context: Context):
    node = context.node_config
    windows, labels = data.of_node(int(node["partition-id"]), int(node["num-partitions"]))
    return data.normalise(windows), labels


@app.train()
def train(message: Message, context: Context) -> Message:
    config = context.run_config
    windows, labels = _own(context)
    net = model.make(int(config["seed"]))
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = model.train(
        net,
        windows,
        labels,
        epochs=int(config["local-epochs"]),
        batch=int(config["batch-size"]),
        lr=float(config["learning-rate"]),
        momentum=float(config["momentum"]),
        seed=int(config["seed"]) + int(message.content["config"]["server-round"]),
    )
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    windows, labels = _own(context)
    net = model.make(0)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss, accuracy = model.evaluate(net, windows, labels)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

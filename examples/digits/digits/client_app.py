"""What a node does: train on its own digits, or evaluate the global model on them."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits import data, model

app = ClientApp()


def _own(context: Context):
    config, node = context.run_config, context.node_config
    images, labels, _, _ = data.load(int(config["seed"]))
    indices = data.partition(
        labels,
        int(node["partition-id"]),
        int(node["num-partitions"]),
        float(config["dirichlet-alpha"]),
        int(config["seed"]),
    )
    return images[indices], labels[indices]


@app.train()
def train(message: Message, context: Context) -> Message:
    config = context.run_config
    images, labels = _own(context)
    net = model.make(int(config["seed"]))
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = model.train(
        net,
        images,
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
    images, labels = _own(context)
    net = model.make(0)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss, accuracy = model.evaluate(net, images, labels)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

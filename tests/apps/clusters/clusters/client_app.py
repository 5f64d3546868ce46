"""Trains as `training.plan` says, in torch."""

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from clusters import data, model

app = ClientApp()


def _own(message, context):
    columns = data.of_node(context.node_config, context.run_config).read(range(50))
    net = model.make(0)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net, torch.from_numpy(columns["point"]), torch.from_numpy(columns["label"])


@app.train()
def train(message, context):
    config = context.run_config
    net, x, y = _own(message, context)
    optimiser = torch.optim.SGD(net.parameters(), config["learning-rate"], momentum=config["momentum"])
    order = torch.Generator().manual_seed(config["seed"] + message.content["config"]["server-round"])
    for _ in range(config["local-epochs"]):
        losses = []
        for rows in torch.randperm(len(x), generator=order).split(config["batch-size"]):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    metrics = {"train_loss": sum(losses) / len(losses), "num-examples": len(y)}
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    net, x, y = _own(message, context)
    with torch.no_grad():
        logits = net(x)
    loss, accuracy = nn.functional.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()
    metrics = {"loss": loss, "accuracy": accuracy, "num-examples": len(y)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

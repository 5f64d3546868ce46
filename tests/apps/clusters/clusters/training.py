import torch
from torch import nn

from clusters import model
from fedtide.aggregation.training_export.optimisers import Sgd
from fedtide.aggregation.training_export.plan import TrainingPlan


def plan(config):
    return TrainingPlan(
        module=model.make(0),
        inputs={"point": torch.rand(2, 4)},
        target=torch.tensor([0, 2]),
        loss=nn.functional.cross_entropy,
        optimiser=Sgd(momentum=config["momentum"]),
        metrics={"accuracy": lambda logits, labels: (logits.argmax(1) == labels).float().mean()},
        data="clusters.data:of_node",
    )

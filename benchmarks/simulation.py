"""Ten nodes with digits in one process: real strategies, mods and messages, without a network.

The data and the network are those of the example app `digits`; local training is plain SGD, so that SCAFFOLD
and FedNova do what their papers assume. FedProx's term and SCAFFOLD's correction are applied if asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedtide.fabric.flower import bridge as flower
from tests.offline_grid import OfflineGrid

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))
from digits import data, model

NODES = 10
RATE, BATCH = 0.1, 32

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]
SPLITS = ("iid", "dirichlet 0.5", "dirichlet 0.1", "2 labels")


def split(name: str, labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Indices of each node's samples."""
    rng = np.random.default_rng(seed)
    if name == "iid":
        return np.array_split(rng.permutation(len(labels)), NODES)
    if name.startswith("dirichlet"):
        alpha = float(name.split()[1])
        parts = [data.partition(labels, k, NODES, alpha, seed) for k in range(NODES)]
        return [p if len(p) else np.array([k]) for k, p in enumerate(parts)]
    # Two shards of 20, cut from the samples ordered by label (McMahan et al. 2017, section 3).
    shards = np.array_split(np.argsort(labels, kind="stable"), 2 * NODES)
    order = rng.permutation(2 * NODES)
    return [np.concatenate([shards[order[2 * k]], shards[order[2 * k + 1]]]) for k in range(NODES)]


@dataclass
class Fleet:
    """Nodes with their data and contexts; `mod` stands around their app."""

    parts: list[np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    test: tuple[np.ndarray, np.ndarray]
    seed: int
    epochs: int
    mods: list[Mod | None]
    contexts: list[Context]

    @classmethod
    def of(cls, split_name: str, seed: int, *, epochs: int = 1, mod: Callable[[], Mod] | None = None) -> Fleet:
        images, labels, test_images, test_labels = data.load(seed)
        contexts = [flower.context_of(1, n + 1, {}, {}, RecordDict()) for n in range(NODES)]
        mods = [mod() if mod is not None else None for _ in range(NODES)]
        parts = split(split_name, labels, seed)
        return cls(parts, images, labels, (test_images, test_labels), seed, epochs, mods, contexts)

    def start(self) -> ArrayRecord:
        return ArrayRecord(model.make(self.seed).state_dict())

    def replies(self, strategy: Any, arrays: ArrayRecord, round_: int) -> list[Message]:
        """What the nodes answer to one round's messages, as `configure_train` makes them."""
        sent = list(strategy.configure_train(round_, arrays, ConfigRecord(), OfflineGrid(NODES)))
        found = []
        for message in sorted(sent, key=lambda m: m.metadata.dst_node_id):
            node = message.metadata.dst_node_id - 1
            # Each node has a copy of its own, as it would over a network.
            own = Message(RecordDict(dict(message.content)), message.metadata.dst_node_id, "train")
            flower.stamp(own, f"r{round_}-n{node}")
            app, mod = self._app(node, round_), self.mods[node]
            found.append(mod(own, self.contexts[node], app) if mod else app(own, self.contexts[node]))
        return found

    def accuracy(self, arrays: ArrayRecord) -> float:
        net = model.make(0)
        net.load_state_dict(arrays.to_torch_state_dict())
        return float(model.evaluate(net, *self.test)[1])

    def _app(self, node: int, round_: int) -> Callable[[Message, Context], Message]:
        def app(message: Message, context: Context) -> Message:
            config = message.content["config"]
            net = model.make(0)
            net.load_state_dict(message.content["arrays"].to_torch_state_dict())
            correction = message.content.get("scaffold-correction")
            steps = self._train(net, node, round_, float(config.get("proximal-mu", 0.0)), correction)
            metrics = MetricRecord({"num-examples": len(self.parts[node]), "num-steps": steps})
            content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
            return Message(content, reply_to=message)

        return app

    def _train(self, net: Any, node: int, round_: int, mu: float, correction: ArrayRecord | None) -> int:
        x = torch.from_numpy(self.images[self.parts[node]])
        y = torch.from_numpy(self.labels[self.parts[node]])
        shuffle = torch.Generator().manual_seed(self.seed * 1000 + round_)
        pushes = {k: torch.from_numpy(a.numpy()) for k, a in correction.items()} if correction is not None else {}
        start = {k: p.detach().clone() for k, p in net.named_parameters()}
        net.train()
        steps = 0
        for _ in range(self.epochs):
            for indices in torch.randperm(len(x), generator=shuffle).split(BATCH):
                net.zero_grad()
                torch.nn.functional.cross_entropy(net(x[indices]), y[indices]).backward()
                with torch.no_grad():
                    for name, parameter in net.named_parameters():
                        gradient = parameter.grad + mu * (parameter - start[name])
                        if name in pushes:
                            gradient = gradient + pushes[name]
                        parameter -= RATE * gradient
                steps += 1
        return steps

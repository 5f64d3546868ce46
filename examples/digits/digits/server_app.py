"""FedAvg over all nodes, scored after every round on digits that no node has seen."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits import data, model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    _, _, images, labels = data.load(int(config["seed"]))

    def score(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net = model.make(0)
        net.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = model.evaluate(net, images, labels)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = FedAvg(fraction_evaluate=float(config["fraction-evaluate"]))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.make(int(config["seed"])).state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=score,
    )

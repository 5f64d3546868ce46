"""FedAvg over all nodes, scored after every round on two people whom no node has seen."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sensors import data, model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    windows, labels = data.of_people(data.TEST_SUBJECTS)

    def score(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net = model.make(0)
        net.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = model.evaluate(net, data.normalise(windows), labels)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = FedAvg(fraction_evaluate=float(config["fraction-evaluate"]))
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.make(int(config["seed"])).state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=score,
    )

"""flwr's own strategies and workflows in turn; leaves what came of it in result.json."""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as strategies

app = ServerApp()
START = {"w": np.zeros(8, np.float32), "n": np.asarray(0, np.int64)}


@app.main()
def main(grid: Grid, context: Context) -> None:
    case = str(context.run_config["case"])
    found = {"queries": queries, "secagg": secagg}.get(case, learn)(grid, context, case)
    with open("result.json", "w") as file:
        json.dump(found, file)


def learn(grid: Grid, context: Context, case: str) -> dict:
    common = {"fraction_evaluate": 1.0}
    if case == "dp":
        strategy = strategies.DifferentialPrivacyServerSideAdaptiveClipping(
            strategies.FedAvg(**common), noise_multiplier=0.01, num_sampled_clients=40
        )
    elif case == "Partial":
        strategy = Partial(**common)
    elif case in ("Krum", "Bulyan", "MultiKrum"):
        strategy = getattr(strategies, case)(num_malicious_nodes=0, **common)
    else:
        strategy = getattr(strategies, case)(**common)
    result = strategy.start(grid, ArrayRecord({k: Array(v) for k, v in START.items()}), num_rounds=3)
    return {"w": result.arrays["w"].numpy().tolist(), "rounds": len(result.evaluate_metrics_clientapp)}


class Partial(strategies.FedAvg):
    """Takes what it wants of the replies, and walks them twice."""

    def aggregate_train(self, server_round, replies):
        assert len(replies) == sum(1 for _ in replies)
        return ArrayRecord({**replies[0].content["arrays"]}), None


def queries(grid: Grid, context: Context, case: str) -> dict:
    large = ConfigRecord({"raw": b"\x09" * 9_000_000})
    messages = [Message(RecordDict({"large": large}), n, "query") for n in grid.get_node_ids()]
    replies = grid.send_and_receive(messages)
    first = replies[0].content
    return {
        "replies": len(replies),
        "again": len(list(replies)),
        "large": first["large"]["raw"] == b"\x07" * 9_000_000 and first["large"]["text"] == ["x" * 40_000] * 3,
        "echo": first["echo"] == large,
        "complex": first["odd"]["c"].numpy().tolist() == [1 + 2j],
        "strings": first["odd"]["s"].numpy().tolist(),
        "empty": list(first["second"]["e"].numpy().shape),
    }


def secagg(grid: Grid, context: Context, case: str) -> dict:
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.compat.common.recorddict_compat import arrayrecord_to_parameters
    from flwr.server import LegacyContext, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
    from flwr.server.workflow.constant import MAIN_PARAMS_RECORD

    strategy = FedAvg(
        fraction_evaluate=0.0, min_available_clients=4, initial_parameters=ndarrays_to_parameters([np.zeros(50_000)])
    )
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=1), strategy=strategy)
    fit = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, clipping_range=8.0)
    DefaultWorkflow(fit_workflow=fit)(grid, legacy)
    parameters = arrayrecord_to_parameters(legacy.state.array_records[MAIN_PARAMS_RECORD], keep_input=True)
    mean = parameters_to_ndarrays(parameters)[0]
    return {"mean": float(mean.mean()), "spread": float(np.ptp(mean))}

"""The task as a Flower app, and its Ray simulation.

Actors import this module by name (its ClientApp may not live in `__main__`): what they keep from one message
to the next is then really kept.
"""

import functools
from pathlib import Path

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.compare.outside.task import CLIENTS, ROUNDS, print_round
from benchmarks.compare.outside.trainer import Trainer

WEIGHT = "answer_tokens"


@functools.cache
def trainer(folder: str, threads: int) -> Trainer:
    """Return the trainer of this process, which any client may use."""
    import torch

    torch.set_num_threads(threads)
    return Trainer(Path(folder))


def record(names: list[str], values) -> ArrayRecord:
    """Return a state as Flower sends it."""
    return ArrayRecord({n: Array(v) for n, v in zip(names, values)})


def client_app(folder: str, threads: int) -> ClientApp:
    """Return the app of a client, which computes on this many threads."""
    app = ClientApp()

    def received(message: Message, client: int) -> Trainer:
        import torch

        own = trainer(folder, threads)
        own.load_state([torch.from_numpy(message.content["arrays"][n].numpy()) for n in own.names])
        return own

    @app.train()
    def train(message, context):
        client = context.node_config["partition-id"]
        own = received(message, client)
        own.train(client, message.content["config"]["server-round"] - 1)
        return Message(
            RecordDict({
                "arrays": record(own.names, [p.detach().numpy() for p in own.trained]),
                "metrics": MetricRecord({WEIGHT: own.weight(client)}),
            }),
            reply_to=message,
        )

    @app.evaluate()
    def evaluate(message, context):
        client = context.node_config["partition-id"]
        loss, tokens = received(message, client).held_out([client])
        return Message(
            RecordDict({"metrics": MetricRecord({"loss": loss / tokens, WEIGHT: tokens})}), reply_to=message
        )

    return app


class PrintingFedAvg(FedAvg):
    """Says the held-out loss of each aggregate."""

    def aggregate_evaluate(self, server_round, replies):
        """Average the clients' losses, as Flower does, and print them."""
        metrics = super().aggregate_evaluate(server_round, replies)
        print_round(server_round - 1, metrics["loss"], 1)
        return metrics


def server_app(folder: str) -> ServerApp:
    """Return the app of the server: plain averaging from the starting adapter."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context) -> None:
        from safetensors.numpy import load_file

        state = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
        strategy = PrintingFedAvg(
            min_train_nodes=CLIENTS,
            min_evaluate_nodes=CLIENTS,
            min_available_nodes=CLIENTS,
            weighted_by_key=WEIGHT,
        )
        strategy.start(grid, record(list(state), state.values()), num_rounds=ROUNDS)

    return app


def simulate(folder: Path, actors: int, threads: int) -> None:
    """Run it with this many actors at a time, each on this many threads; Ray is told of as many CPUs as that
    takes.
    """
    from flwr.simulation import run_simulation

    run_simulation(
        server_app(str(folder)),
        client_app(str(folder), threads),
        num_supernodes=CLIENTS,
        backend_config={
            "init_args": {"num_cpus": actors},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )

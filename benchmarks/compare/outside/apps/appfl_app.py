"""The task under APPFL over MPI: rank 0 serves, and evaluates each aggregate; every
other rank is a client.

Everything that APPFL calls `optimize_memory` is off: on, it collects garbage at every step and a round takes
six times as long. It imports metrics of images, whose torchvision from PyPI does not fit a CPU build of
torch: there is no torchvision here, and an empty module in place of the metrics.
"""

import sys
from pathlib import Path
from types import ModuleType

import torch

sys.modules |= {"torchvision": None, "piq": ModuleType("piq")}

from appfl.agent import ClientAgent, ServerAgent  # noqa: E402 - it imports piq
from appfl.algorithm.trainer import BaseTrainer  # noqa: E402
from appfl.comm.mpi import MPIClientCommunicator, MPIServerCommunicator  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from benchmarks.compare.outside.task import CLIENTS, ROUNDS, print_round  # noqa: E402
from benchmarks.compare.outside.trainer import Trainer  # noqa: E402

SERVER = 0


class PeerTrainer(BaseTrainer):
    """APPFL's side of a client. Its parameters are the adapter's, named by their place."""

    def __init__(self, **given):
        super().__init__(**given)
        self.own = Trainer(Path(self.train_configs.folder))
        self.number = self.train_configs.number

    def get_parameters(self):
        return {str(i): value for i, value in enumerate(self.own.state())}

    def load_parameters(self, params):
        self.own.load_state([params[str(i)] for i in range(len(params))])

    def train(self):
        self.own.train(self.number, self.round)
        self.round += 1


class Agent(ServerAgent):
    """A server that knows the adapter only: nothing else is exchanged."""

    def _load_model(self):
        self.own = Trainer(Path(self.server_agent_config.server_configs.folder))
        self.model = torch.nn.ParameterList(self.own.state())


class PrintingServer(MPIServerCommunicator):
    """Says the held-out loss of each aggregate, when the clients have been sent it and train on."""

    printed = 0

    def _check_update_global_model_futures(self):
        super()._check_update_global_model_futures()
        if self.server_agent.scheduler.get_num_global_epochs() > self.printed:
            self.server_agent.own.load_state(self.server_agent.model.parameters())
            print_round(self.printed, *self.server_agent.own.held_out(range(CLIENTS)))
            self.printed += 1


def serve(comm, folder: Path) -> None:
    plain = {"optimize_memory": False}
    agent = Agent(
        OmegaConf.create({
            "client_configs": {},
            "server_configs": {
                "num_clients": CLIENTS,
                "num_global_epochs": ROUNDS,
                "folder": str(folder),
                "logging_output_dirname": str(folder / "appfl"),
                "scheduler": "SyncScheduler",
                "scheduler_kwargs": plain,
                "aggregator": "FedAvgAggregator",
                "aggregator_kwargs": {"client_weights_mode": "sample_size", **plain},
                **plain,
            },
        })
    )
    PrintingServer(comm, agent, logger=agent.logger, optimize_memory=False).serve()


def work(comm, folder: Path, number: int) -> None:
    agent = ClientAgent(
        OmegaConf.create({
            "client_id": f"client {number}",
            "optimize_memory": False,
            "train_configs": {
                "trainer": PeerTrainer.__name__,
                "trainer_path": __file__,
                "folder": str(folder),
                "number": number,
                "logging_output_dirname": str(folder / "appfl"),
            },
        })
    )
    server = MPIClientCommunicator(comm, SERVER, client_id=agent.get_id(), optimize_memory=False)
    agent.load_config(server.get_configuration())
    agent.load_parameters(server.get_global_model(init_model=True))
    server.invoke_custom_action("set_sample_size", sample_size=agent.trainer.own.weight(number))
    while True:
        agent.train()
        state, about = server.update_global_model(agent.get_parameters())
        if about["status"] == "DONE":
            break
        agent.load_parameters(state)
    server.invoke_custom_action("close_connection")


def run_rank(folder: Path) -> None:
    from mpi4py import MPI

    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    if comm.Get_rank() == SERVER:
        serve(comm, folder)
    else:
        work(comm, folder, comm.Get_rank() - 1)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))

"""The task as a job of NVFlare in its simulator, a process for each client.

python -m benchmarks.compare.outside.apps.nvflare_app FOLDER SCRATCH
"""

import sys
from pathlib import Path

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg

from benchmarks.compare.outside.task import CLIENTS, ROUNDS, print_round


class PrintingFedAvg(FedAvg):
    """Lets the clients evaluate each aggregate, and says its held-out loss."""

    def __init__(self, folder: str):
        super().__init__(num_clients=CLIENTS, num_rounds=ROUNDS, persistor_id="")
        self.folder = folder

    def load_model(self) -> FLModel:
        """Return the starting adapter."""
        from safetensors.numpy import load_file

        return FLModel(params=load_file(Path(self.folder) / "adapter" / "adapter_model.safetensors"))

    def save_model(self, model: FLModel) -> None:
        """Evaluate the aggregate of a round, where NVFlare would write it to a file."""
        found = self.send_model_and_wait(task_name="validate", data=model)
        print_round(
            self.current_round,
            sum(result.metrics["loss"] for result in found),
            sum(result.metrics["tokens"] for result in found),
        )


def main(folder: Path, scratch: Path) -> None:
    """Run the job to its end."""
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.client.config import ExchangeFormat
    from nvflare.job_config.api import FedJob
    from nvflare.job_config.script_runner import FrameworkType, ScriptRunner

    # The class as others import it: its name goes into the job's files.
    from benchmarks.compare.outside.apps.nvflare_app import PrintingFedAvg as Controller

    job = FedJob(name="task", min_clients=CLIENTS)
    job.to_server(Controller(str(folder)))
    script = str(Path(__file__).with_name("nvflare_client.py"))
    for client in range(CLIENTS):
        runner = ScriptRunner(
            script=script,
            script_args=str(folder),
            framework=FrameworkType.NUMPY,
            server_expected_format=ExchangeFormat.NUMPY,
        )
        job.to(runner, f"site-{client + 1}", tasks=[AppConstants.TASK_TRAIN, AppConstants.TASK_VALIDATION])
    job.simulator_run(str(scratch / "nvflare"), threads=CLIENTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Hugging Face PEFT with accelerate's ZeRO-3 offload: it trains what one client trains."""

from benchmarks.compare.outside.pins import of_clients, pinned
from benchmarks.compare.outside.system import Site, System, Variant
from benchmarks.compare.outside.task import ALONE

PORT = 29511


def trained(processes: int, threads: int):
    """Return the command of a run with this many processes of this many threads."""

    def command(site: Site) -> list[str]:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        place = ["--master-addr=127.0.0.1", f"--master-port={PORT}"]
        module = ["-m", "benchmarks.compare.outside.apps.accelerate_app"]
        return [str(site.python), *launcher, *place, *module, str(site.folder), str(threads)]

    return command


VARIABLES = {"ACCELERATE_USE_DEEPSPEED": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
ACCELERATE = System(
    "accelerate",
    "accelerate",
    (
        Variant("PEFT + accelerate, ZeRO-3 offload, 1 process", trained(1, 2), ALONE, variables=VARIABLES),
        Variant("PEFT + accelerate, ZeRO-3 offload, 2 processes", trained(2, 1), ALONE, variables=VARIABLES),
    ),
    environment="accelerate",
    installs=(
        (*of_clients(), "accelerate==1.15.0", "setuptools", "wheel", "ninja", "py-cpuinfo"),
        (pinned("deepspeed"), "--no-build-isolation"),
    ),
)

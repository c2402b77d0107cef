"""Flower: its Ray simulation, with clients on two cores in every reasonable arrangement, and a deployment."""

from benchmarks.compare.outside.pins import of_clients
from benchmarks.compare.outside.system import Site, System, Variant, module_command

INSTALLS = (("flwr[simulation]==1.41.0", *of_clients()),)
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


def simulated(actors: int, threads: int):
    """Return the command of a simulation with this many clients at a time, each on this many threads."""

    def command(site: Site) -> list[str]:
        return module_command(site, "apps.flower_run", site.folder, actors, threads)

    return command


def deployed(site: Site) -> list[str]:
    """Return the command that starts and runs a deployment."""
    return module_command(site, "apps.flower_deployment", site.folder, site.scratch)


SIMULATION = System(
    "flower-simulation",
    "flwr",
    (
        Variant("Flower, Ray, 3 x 1 thread", simulated(3, 1), variables=QUIET),
        Variant("Flower, Ray, 2 x 1 thread", simulated(2, 1), variables=QUIET),
        Variant("Flower, Ray, 1 x 2 threads", simulated(1, 2), variables=QUIET),
    ),
    environment="flower",
    installs=INSTALLS,
)
DEPLOYMENT = System(
    "flower-deployment",
    "flwr",
    (Variant("Flower, SuperLink and 3 SuperNodes", deployed, variables=QUIET),),
    environment="flower",
    installs=INSTALLS,
)

"""NVFlare in its simulator: a server and a process for each client."""

from benchmarks.compare.outside.pins import of_clients
from benchmarks.compare.outside.system import Site, System, Variant, module_command


def simulated(site: Site) -> list[str]:
    """Return the command of a simulation."""
    return module_command(site, "apps.nvflare_app", site.folder, site.scratch)


NVFLARE = System(
    "nvflare",
    "nvflare",
    (Variant("NVFlare, simulator, 3 processes", simulated),),
    environment="nvflare",
    installs=(("nvflare==2.9.0", *of_clients()),),
)

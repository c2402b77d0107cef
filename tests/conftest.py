"""Settings that all tests and their processes inherit; set before torch is imported."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("ATEN_CPU_CAPABILITY") in ("avx2", "default"):
    # Otherwise oneDNN packs for AVX-512, which torch does not use with this setting, and 16-bit attention
    # fails with "pack_vnni2 is only supported ...".
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
if (ROOT / ".venv").is_dir():
    # A folder for the compiled operators of this environment: if several environments shared one, each would
    # compile them again after another was used.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".venv" / "torch_extensions"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")

# The slowest files, slowest first. Each worker runs a file at a time, so the last files must be short.
LONGEST = (
    "lab/test_rounds.py",
    "run/test_run_launchers.py",
    "engine/test_engine.py",
    "engine/test_engine_aggregate.py",
    "engine/test_layer_major.py",
    "engine/test_engine_pipeline.py",
    "engine/test_pipeline_clusters.py",
    "federation/test_federation_rounds.py",
    "run/test_run_organisations.py",
    "benchmarks/test_gpu_campaign.py",
    "run/test_run_resume.py",
    "run/test_run_masked.py",
    "routing/anonymous/test_audit.py",
    "routing/anonymous/test_kills.py",
    "federation/test_federation_resume.py",
    "engine/test_generation.py",
    "run/test_mistakes.py",
    "lab/test_slurm.py",
    "evaluation/test_code_tasks.py",
    "evaluation/test_sandbox.py",
    "engine/test_base_placement.py",
    "engine/test_folded.py",
    "routing/anonymous/test_exchange.py",
    "routing/anonymous/test_blame.py",
    "run/test_golden.py",
    "lab/test_virtual_cluster.py",
    "run/test_run_pipeline.py",
    "run/test_run_commands.py",
    "engine/test_gradients.py",
    "cluster/test_heartbeat.py",
    "run/test_run_server.py",
    "planner/test_plan_command.py",
    "run/test_run_audit.py",
    "engine/test_family_engines.py",
    "engine/test_streams.py",
    "engine/test_activations.py",
    "benchmarks/test_ranks.py",
)


def pytest_configure():
    """Set no deadline for examples, whose time depends on the load of the machine."""
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


def pytest_collection_modifyitems(items):
    """Move the files of LONGEST to the front; the others keep their order."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))

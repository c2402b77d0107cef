"""Imports for ranks and runs of tests, made once by the server that forks them (tests/processes.py)."""

import gc
from importlib import import_module

from fedspeed.federation.methods.config import METHODS, Entry

# Methods of tests that whole runs may name. They must be registered before the configuration is imported.
METHODS["served"] = Entry(module="tests.federation.methods.served", server=True, public_rows=True)
METHODS["emulated"] = Entry(module="tests.federation.methods.emulated", server=True, public_rows=True)
METHODS["unlike"] = Entry(module="tests.federation.methods.unlike", server=True, public_rows=True)
METHODS["contrary"] = Entry(module="tests.federation.methods.contrary", server=True)

from fedspeed.session.components import preload  # noqa: E402

_BESIDE = (
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "fedspeed.engine.builders.stock",
    "fedspeed.engine.builders.streamed",
    "fedspeed.engine.builders.client_pipeline",
    "fedspeed.engine.builders.cluster_pipeline",
    "fedspeed.engine.store_engine",
    "fedspeed.engine.streamed",
    "fedspeed.session.rank",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)

preload()
for _name in _BESIDE:
    import_module(_name)
# DeepSpeed collects garbage for every ZeRO-3 engine; frozen objects are not scanned each time.
gc.collect()
gc.freeze()

"""Options of the method `m2fedsa` (`federation.method: {name: m2fedsa}`)."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    name: Literal["m2fedsa"] = "m2fedsa"
    first: int = field(
        default=1, metadata={"help": "number of the model's first blocks that clients compute", "min": 1}
    )
    last: int = field(
        default=0, metadata={"help": "number of the model's last blocks that clients compute", "min": 0}
    )
    body: Literal["shared", "per_client"] = field(
        default="shared",
        metadata={
            "help": "the server's blocks. shared: one adapter, trained with one client after the other, as "
            "published; per_client: an adapter for each client of a round, trained at the same time and "
            "averaged"
        },
    )

    def problems(self, config: Any) -> list[tuple[tuple[str, ...], str]]:
        """Return the rules of this method that a run's configuration breaks, each as (dotted keys that cannot
        be combined, reason and remedy).

        Args:
            config: of the run (config.run.RunConfig).
        """
        adapter = config.adapter
        named = [] if isinstance(adapter.targets, str) else list(adapter.targets)
        single = [name for name in named if any(part.isdecimal() for part in name.split("."))]
        rules = (
            (
                "engine.tier",
                config.engine.tier != "resident",
                f"engine.tier={config.engine.tier} does not compute a part of a model; set "
                "engine.tier=resident",
            ),
            (
                "engine.compile_blocks",
                config.engine.compile_blocks,
                "engine.compile_blocks=true compiles blocks for layer-major execution, which a part of a "
                "model does not have; set engine.compile_blocks=false",
            ),
            (
                "model.dtype",
                config.model.dtype == "fp16",
                "model.dtype=fp16 needs a loss scale that client and server share, which they do not; set "
                "model.dtype=bf16 or fp32",
            ),
            (
                "data.packing",
                config.data.packing,
                "data.packing=true puts several rows into a sequence, which the server's blocks would not "
                "keep apart; set data.packing=false",
            ),
            (
                "adapter.start_from",
                bool(adapter.start_from),
                "adapter.start_from is an adapter of the whole model, of which no rank has all blocks; leave "
                "it out",
            ),
            (
                "adapter.targets",
                bool(single),
                f"adapter.targets names a module of one block ({', '.join(single)}), and both parts of the "
                "model must train; name modules of every block, such as [q_proj, v_proj]",
            ),
            (
                "evaluation.tasks",
                bool(config.evaluation.tasks),
                "evaluation.tasks are scored with the whole model, which no rank has; leave them out, and "
                "run `fedspeed eval` on what the run exports",
            ),
        )
        return [
            (("federation.method", key), f"{text}, or choose another method than m2fedsa")
            for key, is_broken, text in rules
            if is_broken
        ]

"""Options of the method `fedbiot` (`federation.method: {name: fedbiot}`)."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    name: Literal["fedbiot"] = "fedbiot"
    adapter_blocks: int = field(
        default=2,
        metadata={
            "help": "number of the last decoder blocks, whose LoRA the clients train",
            "min": 1,
            "max": 1024,
        },
    )
    dropped: float = field(
        default=0.2,
        metadata={
            "help": "share of the other blocks that the emulator drops; clients have the rest of them, and "
            "the server has all",
            "min": 0.0,
            "below": 1.0,
        },
    )
    proximal: float = field(
        default=0.1,
        metadata={
            "help": "weight of the squared distance between a client's adapted weights and those that the "
            "round began with, in its loss; 0: none",
            "min": 0.0,
        },
    )
    kl: float = field(
        default=0.9,
        metadata={
            "help": "alignment: weight of the divergence between the predictions of full model and emulator, "
            "beside the relative error of the adapter's input; 0: none",
            "min": 0.0,
        },
    )
    alignment_steps: int = field(
        default=10,
        metadata={
            "help": "optimizer steps on public rows with which the server aligns the emulator after each "
            "round; 0: none",
            "min": 0,
            "max": 1_000_000,
        },
    )
    initial_alignment_steps: int = field(
        default=50, metadata={"help": "the same before round 1", "min": 0, "max": 1_000_000}
    )
    alignment_lr: float | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "learning rate of the alignment; auto: the clients' at the beginning of the round",
            "above": 0.0,
        },
    )

    def problems(self, config: Any) -> list[tuple[tuple[str, ...], str]]:
        """Return the rules of this method that a run's configuration breaks, each as (dotted keys that cannot
        be combined, reason and remedy).

        Args:
            config: of the run (config.run.RunConfig).
        """
        problems: list[tuple[tuple[str, ...], str]] = []
        if config.adapter.start_from:
            problems.append((
                ("federation.method", "adapter.start_from"),
                f"adapter.start_from={config.adapter.start_from} says which modules train, but "
                "federation.method=fedbiot chooses them by block, other ones on the server than on clients; "
                "leave adapter.start_from out, or choose another method",
            ))
        if config.engine.compile_blocks:
            problems.append((
                ("federation.method", "engine.compile_blocks"),
                "engine.compile_blocks=true computes all blocks by the code of one, but "
                "federation.method=fedbiot adds different weights to each block of the emulator; set "
                "engine.compile_blocks=false, or choose another method",
            ))
        if config.engine.tier in ("int8", "nf4"):
            problems.append((
                ("federation.method", "engine.tier"),
                f"engine.tier={config.engine.tier} quantises the base of clients only, so that the server of "
                "federation.method=fedbiot would align another emulator than clients have; set another "
                "engine.tier, or choose another method",
            ))
        return problems

"""Options of the method `fate_llm` (`federation.method: {name: fate_llm}`)."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    name: Literal["fate_llm"] = "fate_llm"
    secure_sum: Literal["native", "compact", "none"] = field(
        default="native",
        metadata={
            "help": "how updates are summed. native: under FATE's pairwise masks, 16 bytes a parameter to "
            "the first participant and 8 back; compact: the same with integers of 4 bytes both ways; none: "
            "as routing.mode says"
        },
    )

    def problems(self, config: Any) -> list[tuple[tuple[str, ...], str]]:
        """Return the rules of this method that a run's configuration breaks, each as (dotted keys that cannot
        be combined, reason and remedy).

        Args:
            config: of the run (config.run.RunConfig).
        """
        mode = config.routing.mode
        if self.secure_sum == "none" or mode in ("plain", "auto"):
            return []
        return [
            (
                ("federation.method.secure_sum", "routing.mode"),
                f"federation.method.secure_sum={self.secure_sum} is a sum of its own, which protects less "
                f"than routing.mode={mode}; set routing.mode=plain to measure it inside one trust domain, or "
                "federation.method.secure_sum=none",
            )
        ]

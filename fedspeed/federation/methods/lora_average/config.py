"""Options of the method `lora_average` (`federation.method: {name: lora_average}`)."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    name: Literal["lora_average"] = "lora_average"
    rule: Literal["avg_factors", "freeze_a", "alternate"] = field(
        default="avg_factors",
        metadata={
            "help": "avg_factors: mean of A and of B, or of whatever is trained; freeze_a: train only B; "
            "alternate: B and A in turn by round"
        },
    )

    def problems(self, config: Any) -> list[tuple[tuple[str, ...], str]]:
        """Return the rules of this method that a run's configuration breaks, each as (dotted keys that cannot
        be combined, reason and remedy).

        Args:
            config: of the run (config.run.RunConfig).
        """
        problems: list[tuple[tuple[str, ...], str]] = []
        setting = f"federation.method.rule={self.rule}"
        if config.adapter.method != "lora" and self.rule != "avg_factors":
            problems.append((
                ("federation.method", "adapter.method"),
                f"{setting} works on LoRA factors, but adapter.method is {config.adapter.method}; choose "
                "federation.method.rule=avg_factors (which averages whatever is trained), or "
                "adapter.method=lora",
            ))
        if config.federation.local_optimizer == "keep" and self.rule == "alternate":
            problems.append((
                ("federation.method", "federation.local_optimizer"),
                f"federation.local_optimizer=keep decays the moments of the factors that {setting} freezes; "
                "set federation.local_optimizer=reset, or choose another rule",
            ))
        return problems

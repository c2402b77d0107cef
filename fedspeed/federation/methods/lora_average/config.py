"""What `federation.method: {name: lora_average}` may be told."""

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
        """Return the method's own rules that a run's configuration breaks, each as (dotted keys that do not
        go together, why not and what to do).
        """
        found = []
        named = f"federation.method.rule={self.rule}"
        if config.adapter.method != "lora" and self.rule != "avg_factors":
            found.append((
                ("federation.method", "adapter.method"),
                f"{named} works on LoRA factors, but adapter.method is {config.adapter.method}; choose "
                "federation.method.rule=avg_factors (which averages whatever is trained), or "
                "adapter.method=lora",
            ))
        if config.federation.local_optimizer == "keep" and self.rule == "alternate":
            found.append((
                ("federation.method", "federation.local_optimizer"),
                f"federation.local_optimizer=keep ages the moments of the factors that {named} freezes; set "
                "federation.local_optimizer=reset, or choose another rule",
            ))
        return found

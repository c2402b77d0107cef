"""`fate_llm`: the homogeneous federation of FATE-LLM (Fan et al., 2023; FATE-LLM 2.2, `FedHomoLLM`).

Clients train LoRA factors, which are averaged separately, weighted by the clients' rows: `lora_average` with
the rule `avg_factors`. What makes it FATE's is around it:

- updates are summed under pairwise masks (`secure_sum`, routing.pairwise);
- its preset has FATE's settings: a round is one local epoch (federation.round_budget=epoch), the local
  optimizer is kept between rounds, and ZeRO-2 offloads it to the CPU.

As in FATE, nothing but parameters is sent: there is no sketch from which the error of averaging factors could
be estimated, and 16 bytes a parameter are all.
"""

from typing import Any

from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import Traffic
from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.monitor.metrics.metric import SKETCH
from fedspeed.planner.plan import Task


class FateLlm(LoraAverage):
    """Averaging of parameters without a sketch."""

    def __init__(self, config: Any, layout: Layout, *, hides: frozenset[str] = frozenset(), **run: Any):
        super().__init__(config, layout, hides=hides | {SKETCH}, **run)

    def traffic(self, task: Task, participants: int) -> Traffic:
        """Predict the bytes of a client that is not the arbiter, which sends the sum to all others."""
        if self.config.secure_sum == "none" or participants == 1:
            return super().traffic(task, participants)
        from fedspeed.routing.pairwise.encodings import ENCODINGS  # loads cryptography

        encoding = ENCODINGS[self.config.secure_sum]
        values = self.values(1)
        return Traffic(values * encoding.bytes_up, values * encoding.bytes_down)
